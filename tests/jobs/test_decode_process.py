"""The decode job as a process of its own: sudden death, no half-written file at any time, usage errors, object storage."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from safetensors.torch import save

from pipeline.decode_config import DecodeRunConfig
from pipeline.storage import Storage
from pipeline.videos.publish import read_videos
from tests.jobs.conftest import ROOT
from tests.jobs.processes import run_job, start_job_and_wait

JOB = ROOT / "jobs" / "decode_latents.py"


def job_arguments(config: DecodeRunConfig) -> list[str]:
    return [
        f"--input.uri={config.input.uri}",
        "--input.scale=none",
        f"--output.uri={config.output.uri}",
        f"--output.container={config.output.container}",
        f"--vae.weights={config.vae.weights}",
        "--vae.dtype=float32",
        "--cluster.actors=2",
        "--cluster.threads_per_actor=1",
        "--run.log_every_s=0.5",
    ]


def make_latent(number: int) -> bytes:
    return save({"latent": torch.randn(16, 5, 4, 6, generator=torch.Generator().manual_seed(number))})


@pytest.fixture
def many_latents(tmp_path: Path) -> Path:
    folder = tmp_path / "latents"
    folder.mkdir()
    for number in range(40):
        (folder / f"clip{number:02d}.safetensors").write_bytes(make_latent(number))
    return folder


def videos_of(config: DecodeRunConfig) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(config.output.uri, "videos").iterdir()}


class Watcher:
    """Opens every video that it sees, as soon as it sees it, and counts its frames."""

    def __init__(self, folder: Path) -> None:
        self.seen: dict[str, int] = {}
        self._folder = folder
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Watcher:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.01):
            for path in self._folder.glob("*") if self._folder.exists() else ():
                if path.name not in self.seen:
                    self.seen[path.name] = self._count_frames(path)

    @staticmethod
    def _count_frames(path: Path) -> int:
        try:
            with av.open(str(path)) as container:
                return sum(1 for _ in container.decode(video=0))
        except av.FFmpegError:
            return -1


@pytest.fixture
def watcher(tmp_path: Path) -> Iterator[Watcher]:
    with Watcher(tmp_path / "videos" / "videos") as watcher:
        yield watcher


@pytest.mark.slow  # the matrix has a short cell of a killed driver
@pytest.mark.usefixtures("many_latents")
def test_a_driver_killed_in_the_middle_resumes_to_the_same_videos(
    make_decode_config: Any, tmp_path: Path, ray_tmp: Path, watcher: Watcher
) -> None:
    undisturbed = make_decode_config(output={"uri": str(tmp_path / "undisturbed"), "container": "mp4"})
    assert run_job(JOB, job_arguments(undisturbed), ray_tmp).returncode == 0
    config = make_decode_config(output={"container": "mp4"})
    done = Path(config.output.uri, "done")
    process = start_job_and_wait(JOB, job_arguments(config), ray_tmp, lambda: any(done.rglob("*.json")))
    process.kill()
    process.wait()
    assert len(list(done.rglob("*.json"))) < 32, "the run was over before it was killed"
    again = run_job(JOB, job_arguments(config), ray_tmp)
    assert again.returncode == 0, again.stderr
    assert videos_of(config) == videos_of(undisturbed)
    assert len(videos_of(config)) == 40
    assert set(watcher.seen.values()) == {17}, "a video was seen before it was whole"
    assert len(watcher.seen) > 10


def test_usage_errors_exit_with_2_and_say_what_to_give(make_decode_config: Any, many_latents: Path, ray_tmp: Path) -> None:
    arguments = [argument for argument in job_arguments(make_decode_config()) if "scale" not in argument]
    result = run_job(JOB, arguments, ray_tmp)
    assert result.returncode == 2
    assert "say in input.scale what these latents were multiplied by" in result.stderr
    assert run_job(JOB, [*arguments, "--input.layuot=CFHW"], ray_tmp).returncode == 2
    help_text = subprocess.run([sys.executable, str(JOB), "--help"], capture_output=True, text=True, check=True).stdout
    assert "--input.scale" in help_text
    assert "Decodes CogVideoX latents" in help_text


def test_latents_and_videos_may_be_in_object_storage(s3: Any, make_decode_config: Any, ray_tmp: Path) -> None:
    source, target = Storage(s3.uri("decode/in")), Storage(s3.uri("decode/out"))
    for number in range(3):
        source.put(f"clip{number}.safetensors", make_latent(number))
    config = make_decode_config(input={"uri": s3.uri("decode/in")}, output={"uri": s3.uri("decode/out")})
    result = run_job(JOB, job_arguments(config), ray_tmp)
    assert result.returncode == 0, result.stderr
    videos = list(read_videos(target))
    assert [(video["name"], video["num_frames"]) for video in videos] == [(f"clip{number}", 17) for number in range(3)]
    for video in videos:
        assert len(target.read(video["path"])) == video["size_bytes"]
