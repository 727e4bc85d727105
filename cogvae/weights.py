"""Weight files: find them, load them into a model, write them, and tell one set of weights from another.

The layout is diffusers': config.json beside diffusion_pytorch_model.safetensors, or an index and its shards.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from cogvae.config import ANNOTATIONS, CLASS_NAME, FIELD_NAMES, VAEConfig
from cogvae.sources import Source, open_source

CONFIG_NAME = "config.json"
STEM = "diffusion_pytorch_model"
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class WeightFiles:
    """Local paths of one VAE's files. Nothing is read before it is asked for."""

    config: Path
    """config.json"""
    tensors: tuple[Path, ...]
    """The safetensors files, in order."""
    name: str
    """What the caller asked for: ends up in the config as `_name_or_path`."""

    def read_config(self) -> VAEConfig:
        """Raises: ValueError that names the file, the field and its value."""
        try:
            values = json.loads(self.config.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{self.config}: not JSON: {error}. Fetch or write it again.") from error
        found = values.get("_class_name", CLASS_NAME) if isinstance(values, dict) else type(values).__name__
        if found != CLASS_NAME:
            raise ValueError(
                f"{self.config}: describes {found}, expected {CLASS_NAME}. Point to the folder of the VAE, often subfolder='vae'."
            )
        try:
            return VAEConfig.from_dict({**values, "_name_or_path": self.name})
        except ValueError as error:
            raise ValueError(f"{self.config}: {error}") from error

    def fingerprint(self) -> str:
        """Hash over everything that decides what the model computes, and nothing else.

        Paths, file names, sharding, file metadata and config keys without effect leave it unchanged.
        """
        digest = hashlib.sha256()
        config = self.read_config()
        effective = {name: config[name] for name in FIELD_NAMES if name not in ANNOTATIONS}
        digest.update(json.dumps(effective).encode())
        # The tensors are views of the mapped files until their bytes are hashed.
        for _, key, tensor in sorted(_read(self.tensors), key=lambda item: item[1]):
            digest.update(f"{key} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()


def resolve_weights(
    source: str | os.PathLike[str],
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    storage_options: Mapping[str, Any] | None = None,
) -> WeightFiles:
    """Finds a VAE's files and brings them to this machine.

    `source` is a URL if it has a scheme (`s3://bucket/model`), else an existing local folder, else a hub
    repository id. `storage_options` go to fsspec. Several processes of one node may call this at once.

    Raises: FileNotFoundError where a file is missing; OSError where the source cannot be reached.
    """
    folder = open_source(
        source,
        subfolder=subfolder,
        revision=revision,
        cache_dir=cache_dir,
        token=token,
        local_files_only=local_files_only,
        storage_options=storage_options,
    )
    config = folder.fetch(CONFIG_NAME)
    if config is None:
        raise FileNotFoundError(f"{folder}: no {CONFIG_NAME} there. Point to the VAE's folder, in a pipeline subfolder='vae'.")
    return WeightFiles(config, _fetch_tensors(folder, variant), os.fspath(source))


def _fetch_tensors(folder: Source, variant: str | None) -> tuple[Path, ...]:
    index = folder.fetch(_index_name(variant))
    if index is None:
        whole = folder.fetch(_weights_name(variant))
        if whole is not None:
            return (whole,)
        raise FileNotFoundError(
            f"{folder}: neither {_weights_name(variant)} nor {_index_name(variant)} there. "
            f"Names such as {_weights_name('fp16')} need variant='fp16'. Only safetensors are read: a .bin "
            "converts by loading and saving it with diffusers, a SAT 3d-vae.pt with cogvae.sat."
        )
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{index}: not a safetensors index ({error!r}): expected a JSON object 'weight_map'") from error
    return tuple(_fetch_shard(folder, index, name) for name in names)


def _fetch_shard(folder: Source, index: Path, name: str) -> Path:
    # An index is data from outside: it must not choose files elsewhere on this machine.
    if not re.fullmatch(r"[\w-][\w.-]*\.safetensors", name):
        raise ValueError(f"{index}: shard {name!r} is not the plain name of a .safetensors file in the same folder")
    shard = folder.fetch(name)
    if shard is None:
        raise FileNotFoundError(f"{folder}: no {name}, which {index.name} lists. Fetch the folder again.")
    return shard


def load_weights(
    files: WeightFiles,
    model: nn.Module,
    *,
    torch_dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> None:
    """Gives `model`, which may be on the meta device, the tensors of `files`, one at a time.

    `torch_dtype=None` means float32, whatever the files hold, as in diffusers.

    Raises: ValueError that names the tensor and the file if a key is missing, surplus or of another shape.
    """
    assign_tensors(model, _read(files.tensors), torch_dtype=torch_dtype, device=device)


def assign_tensors(
    model: nn.Module,
    tensors: Iterable[tuple[Path, str, Tensor]],
    *,
    torch_dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> None:
    """Replaces every tensor of `model` by a copy of the given ones: (file, key, tensor)."""
    expected = {key: tensor.shape for key, tensor in model.state_dict().items()}
    state: dict[str, Tensor] = {}
    paths: dict[Path, None] = {}
    for path, key, tensor in tensors:
        paths[path] = None
        if key not in expected:
            raise ValueError(
                f"{path}: surplus tensor '{key}': the model of this config has none of that name. Are "
                "weights and config.json of one VAE? SAT checkpoints convert with cogvae.sat."
            )
        if key in state:
            raise ValueError(f"{path}: tensor '{key}' is also in another shard. Save the model again.")
        if tensor.shape != expected[key]:
            raise ValueError(
                f"{path}: tensor '{key}' has shape {list(tensor.shape)}, the config asks for "
                f"{list(expected[key])}. Use the config that belongs to these weights."
            )
        # A copy, never a view of the mapped file: the file may change or go while the model lives.
        state[key] = tensor.to(device, torch_dtype or torch.float32, copy=True)
    missing = [key for key in expected if key not in state]
    if missing:
        raise ValueError(
            f"{', '.join(map(str, paths))}: {len(missing)} of {len(expected)} tensors missing, first "
            f"{missing[:3]}. The file is not whole, or the config belongs to another model."
        )
    model.load_state_dict(state, strict=True, assign=True)


def save_weights(
    directory: str | os.PathLike[str],
    config: VAEConfig,
    state: Mapping[str, Tensor],
    *,
    variant: str | None = None,
    max_shard_size: int | str = "10GB",
) -> None:
    """Writes config.json and safetensors as diffusers lays them out; removes shards of an earlier save."""
    folder = Path(directory)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: pass the folder to save into")
    folder.mkdir(parents=True, exist_ok=True)
    shards = _split(state, _size_bytes(max_shard_size))
    stem = ".".join(filter(None, (STEM, variant)))
    names = [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = [_weights_name(variant)]
    for name, shard in zip(names, shards, strict=True):
        partial = folder / f".{name}.partial"
        partial.touch()
        mode = partial.stat().st_mode
        save_file(shard, partial, metadata={"format": "pt"})
        partial.chmod(mode)  # safetensors makes it readable by its owner alone
        os.replace(partial, folder / name)
    stale = re.compile(rf"{re.escape(stem)}(-\d{{5}}-of-\d{{5}})?\.safetensors")
    for path in folder.iterdir():
        if (stale.fullmatch(path.name) and path.name not in names) or path.name == _index_name(variant):
            path.unlink()
    if len(shards) > 1:
        weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        total = sum(tensor.nbytes for tensor in state.values())
        _write_json(folder / _index_name(variant), {"metadata": {"total_size": total}, "weight_map": weight_map})
    _write_json(folder / CONFIG_NAME, config.to_json_dict())


def _split(state: Mapping[str, Tensor], limit_bytes: int) -> list[dict[str, Tensor]]:
    """Fills shards in order, as the hub's library does; a tensor above the limit has one of its own."""
    shards: list[dict[str, Tensor]] = []
    current: dict[str, Tensor] = {}
    used = 0
    for key, tensor in state.items():
        tensor = tensor.detach().contiguous()
        if tensor.nbytes > limit_bytes:
            shards.append({key: tensor})
            continue
        if used + tensor.nbytes > limit_bytes:
            shards.append(current)
            current, used = {}, 0
        current[key] = tensor
        used += tensor.nbytes
    return [*shards, current] if current else shards


def _size_bytes(size: int | str) -> int:
    if isinstance(size, int):
        return size
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", size)
    if match is None or match[2].upper() not in _UNITS:
        raise ValueError(f"max_shard_size={size!r}: expected bytes as an integer, or a text like '10GB' or '500MB'")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(partial, path)


def _weights_name(variant: str | None) -> str:
    return ".".join(filter(None, (STEM, variant, "safetensors")))


def _index_name(variant: str | None) -> str:
    return ".".join(filter(None, (STEM, "safetensors.index", variant, "json")))


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(
            f"{path}: {path.stat().st_size} bytes that are no whole safetensors file ({error}). Fetch it "
            "again; in a git checkout run `git lfs pull`."
        ) from error


def _read(paths: Iterable[Path]) -> Iterator[tuple[Path, str, Tensor]]:
    for path in paths:
        with _opened(path) as file:
            for key in file.keys():  # noqa: SIM118 (a file is no mapping)
                yield path, key, file.get_tensor(key)
