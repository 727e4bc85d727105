"""The decode run from end to end in this process: real latents, real model, real actors."""

from __future__ import annotations

import functools
import io
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from cogvae import AutoencoderKLCogVideoX
from pipeline.account import ExitCode
from pipeline.dataset import LatentDataset
from pipeline.dataset.scaling import scale_latents
from pipeline.engine import load_engine
from pipeline.errors import ConfigError, RunRefusedError
from pipeline.storage import Storage
from pipeline.types import Bucket, Frames
from pipeline.videos.publish import read_videos
from tests.jobs.conftest import CLIPS, GOOD_CLIPS, read_quarantine, run_decode, run_encode, small_config
from tests.jobs.sabotage import load_sabotaged

pytestmark = pytest.mark.usefixtures("cluster")


def read_manifest(output: str) -> list[dict[str, Any]]:
    return list(read_videos(Storage(str(output))))


def read_frames(path: Path) -> Frames:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def file_bytes(output: str) -> dict[str, bytes]:
    """The videos of an output, by name."""
    return {path.name: path.read_bytes() for path in Path(output, "videos").rglob("*") if path.is_file()}


@pytest.fixture
def decode_alone(tiny_vae: Path) -> Callable[[torch.Tensor], Frames]:
    """A latent's frames by the model itself, without the pipeline."""
    vae = AutoencoderKLCogVideoX.from_pretrained(tiny_vae, torch_dtype=torch.float32)

    @torch.inference_mode()
    def decode(latent: torch.Tensor) -> Frames:
        sample = vae.decode(latent[None].float()).sample[0]
        return ((sample + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 3, 0).numpy()

    return decode


@pytest.fixture
def latents(tmp_path: Path) -> dict[str, torch.Tensor]:
    """Ten generated latents of two shapes, as a generator's folder."""
    folder = tmp_path / "latents"
    folder.mkdir()
    generator = torch.Generator().manual_seed(3)
    made: dict[str, torch.Tensor] = {}
    for number in range(10):
        made[f"clip{number}"] = torch.randn(16, 3 if number % 2 else 2, 4, 6, generator=generator)
    for name, latent in made.items():
        save_file({"latent": latent}, folder / f"{name}.safetensors")
    return made


@pytest.fixture(scope="module")
def encoded(cluster: None, tiny_vae: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A dataset of every clip of the demo that can be encoded, for reading only."""
    folder = tmp_path_factory.mktemp("encoded")
    config = small_config(CLIPS, tiny_vae, folder / "dataset", output={"first_frame": True})
    assert run_encode(config) == ExitCode.COMPLETE
    return str(config.output.uri)


def test_every_encoded_clip_comes_back_exactly_as_the_model_decodes_it(
    encoded: str, make_decode_config: Any, decode_alone: Callable[[torch.Tensor], Frames]
) -> None:
    config = make_decode_config(input={"uri": encoded})
    assert run_decode(config) == ExitCode.COMPLETE
    videos = {video["columns"]["sample_id"]: video for video in read_manifest(config.output.uri)}
    dataset = LatentDataset(encoded)
    assert len(videos) == len(dataset) >= 8
    assert {Path(name).stem for name in GOOD_CLIPS} < {video["name"] for video in videos.values()}
    for item in dataset:
        video, bucket = videos[item["sample_id"]], Bucket.parse(item["bucket_key"])
        path = Path(config.output.uri, video["path"])
        with av.open(str(path)) as container:
            assert container.streams.video[0].average_rate == bucket.exact_fps
        frames = read_frames(path)
        assert frames.shape == (bucket.num_frames, bucket.height, bucket.width, 3)
        np.testing.assert_array_equal(frames, decode_alone(item["latent"]))
        assert (video["num_frames"], video["height"], video["width"], video["fps"]) == (9, 32, 48, 8.0)
        assert "caption" in video["columns"]
    page = Path(config.output.uri, "report.html").read_text()
    assert page.count("<video ") == len(dataset)


def test_the_lossy_containers_hold_the_same_pictures_to_codec_error(
    encoded: str, make_decode_config: Any, decode_alone: Callable[[torch.Tensor], Frames], tmp_path: Path
) -> None:
    latent = LatentDataset(encoded)[0]
    expected = decode_alone(latent["latent"])
    chosen = {"uri": encoded, "ids": [latent["sample_id"]]}
    outputs = {name: tmp_path / name for name in ("mp4", "png", "webp")}
    for container, output in outputs.items():
        config = make_decode_config(input=chosen, output={"uri": str(output), "container": container, "crf": 10})
        assert run_decode(config) == ExitCode.COMPLETE
    (mp4,) = outputs["mp4"].glob("videos/*.mp4")
    difference = read_frames(mp4).astype(float) - expected
    # The pictures of random weights are noise, the worst there is for a codec that halves the colours.
    assert np.abs(difference).mean() < 12
    (pngs,) = outputs["png"].glob("videos/*.zip")
    with zipfile.ZipFile(pngs) as archive:
        pictures = [np.asarray(Image.open(io.BytesIO(archive.read(name)))) for name in archive.namelist()]
    np.testing.assert_array_equal(np.stack(pictures), expected)
    (webp,) = outputs["webp"].glob("videos/*.webp")
    with Image.open(webp) as picture:  # equal neighbours are one frame that stays longer
        durations = []
        for frame in range(picture.n_frames):  # type: ignore[attr-defined]
            picture.seek(frame)
            picture.load()
            durations.append(picture.info["duration"])
    assert sum(durations) == pytest.approx(1000 * len(expected) / 8, abs=2 * len(durations))


def test_one_latent_in_every_form_and_layout_gives_one_video(make_decode_config: Any, tmp_path: Path) -> None:
    latent = torch.randn(16, 3, 4, 6, generator=torch.Generator().manual_seed(1))
    folder = tmp_path / "latents"
    folder.mkdir()
    layouts = {"CFHW": latent, "FCHW": latent.transpose(0, 1), "BCFHW": latent[None], "BFCHW": latent.transpose(0, 1)[None]}
    for layout, tensor in layouts.items():
        tensor = tensor.contiguous()
        save_file({"latent": tensor}, folder / f"safetensors-{layout}.safetensors")
        np.save(folder / f"npy-{layout}.npy", tensor.numpy())
        np.savez(folder / f"npz-{layout}.npz", tensor.numpy())
        torch.save({"latents": tensor}, folder / f"pt-{layout}.pt")
        row = {"vae_latent_bytes": [tensor.numpy().tobytes()], "vae_latent_shape": [list(tensor.shape)]}
        pq.write_table(pa.table({**row, "vae_latent_dtype": ["float32"]}), folder / f"parquet-{layout}.parquet")
    config = make_decode_config(input={"scale": "none"})
    assert run_decode(config) == ExitCode.COMPLETE
    videos = file_bytes(config.output.uri)
    assert len(videos) == 20
    assert len(set(videos.values())) == 1


def test_a_named_model_s_scale_is_undone(
    make_decode_config: Any, tmp_path: Path, decode_alone: Callable[[torch.Tensor], Frames]
) -> None:
    latent = torch.randn(16, 3, 4, 6, generator=torch.Generator().manual_seed(2))
    padded = torch.cat([latent[:, :1], latent], dim=1)  # as a 1.5 transformer makes it: an even number, the first twice
    (tmp_path / "latents").mkdir()
    scaled = scale_latents(padded, "cogvideox-1.5-5b").transpose(0, 1).contiguous()
    np.save(tmp_path / "latents" / "generated.npy", scaled.numpy())
    config = make_decode_config(input={"scale": "cogvideox-1.5-5b"}, output={"fps": 16})
    assert run_decode(config) == ExitCode.COMPLETE
    (video,) = read_manifest(config.output.uri)
    frames = read_frames(Path(config.output.uri, video["path"]))
    assert (len(frames), video["fps"]) == (9, 16.0)
    assert (video["layout"], video["multiplier"], video["dropped_frames"]) == ("FCHW", 0.7, 1)
    # Scaling and its inverse round once each, which may tip a pixel.
    assert np.abs(frames.astype(int) - decode_alone(latent)).max() <= 1


def test_scale_must_be_said_for_latents_that_are_not_ours(make_decode_config: Any, latents: Any) -> None:
    with pytest.raises(ConfigError, match=r"input\.scale"):
        run_decode(make_decode_config())


@pytest.mark.parametrize("action", ["die", "raise"])
def test_a_disturbed_run_gives_the_same_videos(make_decode_config: Any, latents: Any, tmp_path: Path, action: str) -> None:
    undisturbed = make_decode_config(input={"scale": "none"}, output={"uri": str(tmp_path / "undisturbed")})
    assert run_decode(undisturbed) == ExitCode.COMPLETE
    config = make_decode_config(input={"scale": "none"}, cluster={"actors": 2})
    mark = tmp_path / action
    assert run_decode(config, functools.partial(load_sabotaged, mark, action, 3)) == ExitCode.COMPLETE
    assert mark.exists()
    assert file_bytes(config.output.uri) == file_bytes(undisturbed.output.uri)
    assert len(file_bytes(config.output.uri)) == 10
    assert read_manifest(config.output.uri) == read_manifest(undisturbed.output.uri)


def test_what_cannot_be_decoded_is_quarantined_and_the_rest_is_written(
    make_decode_config: Any, latents: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    folder = tmp_path / "latents"
    save_file({"latent": torch.full((16, 3, 4, 6), torch.nan)}, folder / "nan.safetensors")
    save_file({"latent": torch.zeros(16, 16, 4, 6)}, folder / "ambiguous.safetensors")
    (folder / "cut.npy").write_bytes(np.lib.format.MAGIC_PREFIX + b"\x01\x00")
    config = make_decode_config(input={"scale": "none"})
    assert run_decode(config) == ExitCode.COMPLETE
    reasons = {Path(row["uri"]).name: row["reason"] for row in read_quarantine(Path(config.output.uri))}
    assert set(reasons) == {"nan.safetensors", "ambiguous.safetensors", "cut.npy"}
    assert (reasons["nan.safetensors"], reasons["ambiguous.safetensors"]) == ("not_finite", "layout_ambiguous")
    status = json.loads(Path(config.output.uri, "status.json").read_text())
    assert (status["planned"], status["written"], status["quarantined"], status["pending"]) == (13, 10, 3, 0)


def test_running_again_reads_no_latent_and_changes_no_video(make_decode_config: Any, latents: Any, tmp_path: Path) -> None:
    config = make_decode_config(input={"scale": "none"})
    run_decode(config)
    before = {path: path.stat().st_mtime_ns for path in Path(config.output.uri).rglob("videos/*")}
    shutil.rmtree(tmp_path / "latents")
    assert run_decode(config) == ExitCode.COMPLETE
    assert {path: path.stat().st_mtime_ns for path in Path(config.output.uri).rglob("videos/*")} == before


def test_append_decodes_what_is_new_under_a_name_of_its_own(make_decode_config: Any, latents: Any, tmp_path: Path) -> None:
    run_decode(make_decode_config(input={"scale": "none"}))
    (tmp_path / "latents" / "more").mkdir()
    save_file({"latent": latents["clip0"] + 1}, tmp_path / "latents" / "more" / "clip0.safetensors")
    config = make_decode_config(input={"scale": "none"}, run={"append": True})
    assert run_decode(config) == ExitCode.COMPLETE
    names = [video["name"] for video in read_manifest(config.output.uri)]
    assert len(names) == len(set(names)) == 11
    assert sum(name.startswith("clip0-") for name in names) == 1


def test_rows_are_chosen_by_condition_and_by_sample(encoded: str, make_decode_config: Any, tmp_path: Path) -> None:
    config = make_decode_config(input={"uri": encoded, "filters": ["caption~rabbit"]})
    assert run_decode(config) == ExitCode.COMPLETE
    captions = [video["columns"]["caption"] for video in read_manifest(config.output.uri)]
    assert 0 < len(captions) < len(LatentDataset(encoded))
    assert all("rabbit" in caption.casefold() for caption in captions)
    outputs = [str(tmp_path / name) for name in ("once", "again")]
    for output in outputs:
        assert run_decode(make_decode_config(input={"uri": encoded, "sample": 2}, output={"uri": output})) == ExitCode.COMPLETE
    assert len(file_bytes(outputs[0])) == 2
    assert file_bytes(outputs[0]) == file_bytes(outputs[1])


def test_a_filter_that_nothing_passes_is_named(encoded: str, make_decode_config: Any) -> None:
    with pytest.raises(ConfigError, match=r"of \d+ latents none passes input\.ids and input\.filters"):
        run_decode(make_decode_config(input={"uri": encoded, "filters": ["psnr>30"]}))


def test_another_recipe_and_the_output_of_another_job_are_refused(encoded: str, make_decode_config: Any, latents: Any) -> None:
    run_decode(make_decode_config(input={"scale": "none"}))
    with pytest.raises(RunRefusedError, match="container: 'mkv' there, 'mp4' here"):
        run_decode(make_decode_config(input={"scale": "none"}, output={"container": "mp4"}))
    with pytest.raises(RunRefusedError, match="is the output of a job that encodes"):
        run_decode(make_decode_config(input={"scale": "none"}, output={"uri": encoded}))


def test_shards_of_several_clips_in_batches_give_the_same_videos(
    make_decode_config: Any, latents: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file({"latent": torch.full((16, 3, 4, 6), torch.nan)}, tmp_path / "latents" / "clip5.safetensors")
    assert run_decode(make_decode_config(input={"scale": "none"})) == ExitCode.COMPLETE  # a shard a clip
    monkeypatch.setattr("pipeline.plan.MIN_SHARDS", 1)
    config = make_decode_config(input={"scale": "none"}, output={"uri": str(tmp_path / "batched")}, decode={"batch_size": 3})
    assert run_decode(config) == ExitCode.COMPLETE
    assert len(list(Path(config.output.uri, "done").rglob("*.json"))) == 2  # one a shape
    single = named(str(tmp_path / "videos"))
    batched = named(config.output.uri)
    assert batched.keys() == single.keys() == {f"{name}.mkv" for name in latents if name != "clip5"}
    for name, path in batched.items():
        assert np.abs(read_frames(path).astype(int) - read_frames(single[name])).max() <= 1
    (row,) = read_quarantine(Path(config.output.uri))
    assert "clip5.safetensors" in row["detail"]


def named(output: str) -> dict[str, Path]:
    return {path.name: path for path in Path(output, "videos").iterdir()}


def test_a_latent_beyond_the_limits_is_quarantined_before_it_meets_the_model(make_decode_config: Any, latents: Any) -> None:
    config = make_decode_config(input={"scale": "none"}, decode={"max_frames": 8})
    assert run_decode(config) == ExitCode.COMPLETE
    assert len(file_bytes(config.output.uri)) == 5  # those of two latent frames, eight of the video
    details = [row["detail"] for row in read_quarantine(Path(config.output.uri))]
    assert all("a video of 9 frames of 32x48; decode.max_frames is 8" in detail for detail in details)


class GreedyEngine:
    """Runs out of memory for what has three latent frames."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def decode(self, latents: Any) -> Any:
        if latents[0].shape[1] == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self._engine.decode(latents)

    def is_out_of_memory(self, error: BaseException) -> bool:
        return isinstance(error, torch.OutOfMemoryError)

    def tighten(self) -> str | None:
        return None


def load_greedy(*arguments: Any) -> Any:
    return GreedyEngine(load_engine(*arguments))


def test_what_needs_more_memory_than_there_is_does_not_keep_the_rest_from_being_finished(
    make_decode_config: Any, latents: Any
) -> None:
    config = make_decode_config(input={"scale": "none"}, decode={"max_attempts": 2})
    assert run_decode(config, load_greedy) == ExitCode.COMPLETE
    assert len(file_bytes(config.output.uri)) == 5
    assert {row["reason"] for row in read_quarantine(Path(config.output.uri))} == {"out_of_memory"}


def test_an_output_inside_the_input_is_no_input(make_decode_config: Any, latents: Any, tmp_path: Path) -> None:
    config = make_decode_config(input={"scale": "none"}, output={"uri": str(tmp_path / "latents" / "videos")})
    assert run_decode(config) == ExitCode.COMPLETE
    again = make_decode_config(
        input={"scale": "none"}, output={"uri": str(tmp_path / "latents" / "videos")}, run={"append": True}
    )
    assert run_decode(again) == ExitCode.COMPLETE
    assert read_quarantine(Path(config.output.uri)) == []
    assert len(read_manifest(config.output.uri)) == 10


def test_later_latents_may_bring_other_columns(make_decode_config: Any, latents: Any, tmp_path: Path) -> None:
    run_decode(make_decode_config(input={"scale": "none"}))
    latent = latents["clip1"].numpy()
    row = {"vae_latent_bytes": [latent.tobytes()], "vae_latent_shape": [list(latent.shape)], "vae_latent_dtype": ["float32"]}
    columns = {"prompt": ["a dog"], "seed": pa.array([2**63 + 5], pa.uint64()), "score": [float("nan")]}
    pq.write_table(pa.table({**row, **columns}), tmp_path / "latents" / "more.parquet")
    config = make_decode_config(input={"scale": "none"}, run={"append": True})
    assert run_decode(config) == ExitCode.COMPLETE
    (video,) = [video for video in read_manifest(config.output.uri) if video["source_uri"].endswith("more.parquet")]
    assert (video["columns"]["prompt"], video["columns"]["seed"], video["columns"]["score"]) == ("a dog", str(2**63 + 5), None)


def test_a_video_that_no_record_names_is_told(
    make_decode_config: Any, latents: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_decode_config(input={"scale": "none"})
    stray = Path(config.output.uri, "videos", "stray.mkv")
    assert run_decode(config) == ExitCode.COMPLETE
    stray.write_bytes(b"left by an attempt that died")
    save_file({"latent": latents["clip0"] * 2}, tmp_path / "latents" / "later.safetensors")
    assert run_decode(make_decode_config(input={"scale": "none"}, run={"append": True})) == ExitCode.COMPLETE
    assert "videos that the manifest does not name count=1 first=videos/stray.mkv" in caplog.text
