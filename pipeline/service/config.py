"""Every setting of the decoding service, its default and its meaning."""

from __future__ import annotations

import ipaddress
import os
import re
import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PositiveFloat, PositiveInt, model_validator

from pipeline.config import Section, Settings, StorageOptions, VaeConfig

UPLOAD_COPIES = 8
"""What a body takes while it is read, in bodies: itself, its tensors, and float32 of 16 bits. Measured: 7.5 at most."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def _dataset_name(value: str) -> str:
    if not _NAME.fullmatch(value):
        raise ValueError(f"dataset name {value!r}: use letters, digits, '.', '_' and '-'; it stands in addresses")
    return value


def _expand_uri(value: Any) -> Any:
    """An address may stand alone."""
    return {"uri": value} if isinstance(value, str) else value


class ServedDataset(Section):
    """A latent dataset that the service shows."""

    uri: str
    """Folder of the dataset, on any fsspec URL."""
    storage_options: StorageOptions = Field(default_factory=dict)
    """Passed to fsspec. Credentials belong in the environment."""


DatasetName = Annotated[str, AfterValidator(_dataset_name)]
Served = Annotated[ServedDataset, BeforeValidator(_expand_uri)]


class ServiceConfig(Section):
    """How the service listens, and what it allows."""

    name: str = "latents-decoder"
    """Of the Ray Serve application; other Ray programs find it by this."""
    takeover: bool = False
    """Replace a service of this name that runs on the cluster, such as one whose starting process was killed."""
    host: str = "127.0.0.1"
    """Address to listen on. Any but a loopback address needs the token."""
    port: int = Field(default=8477, ge=1, le=65535)
    """Port to listen on."""
    token_env: str = "LATENTS_TOKEN"
    """Environment variable that holds the bearer token, at least 16 characters. On a loopback address it may be unset."""
    https: bool = False
    """TLS ends in a proxy in front of the service: browsers then send the session cookie over TLS only."""
    replicas: PositiveInt | None = None
    """Copies of the model. Unset: one a GPU, or one on a cluster without GPUs."""
    gpus_per_replica: float = Field(default=1.0, gt=0, le=1)
    """Below 1, several replicas share a GPU."""
    threads_per_replica: PositiveInt | None = None
    """torch threads of a replica on CPU. Unset: the cluster's cores shared among the replicas."""
    max_batch: PositiveInt = 4
    """Latents of one shape that are decoded together. The first thing to lower when the GPU runs out of memory."""
    max_queue: PositiveInt = 64
    """Requests that wait for one replica's model; more are answered 429."""
    max_body_bytes: PositiveInt = 64 << 20
    """Size of one request's body."""
    memory_bytes: PositiveInt = 2 << 30
    """Bodies, latents and answers not yet taken that one replica's requests may hold; more are answered 429."""
    max_frames: PositiveInt = 1024
    """Frames of one video."""
    max_pixels: PositiveInt = 2048 * 1152
    """Pixels of one frame."""
    deadline_s: PositiveFloat = 120
    """From the request's arrival to the whole coded video; then it is answered 408."""
    folder: str | None = None
    """Where coded videos are kept while they are sent, and after. Unset: a folder of this user among temporary files."""
    spool_bytes: PositiveInt = 4 << 30
    """Videos on disk that are being made or sent, of one replica."""
    cache_bytes: int = Field(default=4 << 30, ge=0)
    """Decoded videos kept for the next request, of all replicas of one machine. 0 keeps none."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Of the service's own loggers."""

    @model_validator(mode="after")
    def _memory_holds_a_body(self) -> ServiceConfig:
        if self.memory_bytes < UPLOAD_COPIES * self.max_body_bytes:
            raise ValueError(
                f"memory_bytes is {self.memory_bytes}, but one body of max_body_bytes, {self.max_body_bytes}, takes "
                f"{UPLOAD_COPIES} times that while it is read"
            )
        return self

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the address."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def disk_folder(self) -> Path:
        """Where the spool and the cache lie."""
        return Path(self.folder) if self.folder else Path(tempfile.gettempdir()) / f"cogvideox-latents-{os.getuid()}"


class ServerConfig(Settings):
    """Everything that the decoding service needs."""

    vae: VaeConfig
    datasets: dict[DatasetName, Served] = Field(default_factory=dict)
    """Datasets to show, NAME: URI."""
    service: ServiceConfig = ServiceConfig()
