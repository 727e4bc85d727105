"""How busy the encode job keeps its actor, where the model takes as long as a GPU would.

A stub sleeps in the place of the model, 1.5 times as long as one core takes to decode one clip (measured first), so that
a few decoding cores must keep up with it. Real pictures, 1280x720 H.264, 49 frames of 480x720 each; 40 clips, unless
another number is given. Needs two cores. Prints one JSON line: the share of the time between the beginning of the first
clip and the end of the last one that the actor was busy, and where the rest went.

    python benchmarks/bench_pipeline.py [clips]
"""

from __future__ import annotations

import functools
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch

from pipeline.account import ExitCode
from pipeline.config import DecodeConfig, RunConfig
from pipeline.decoder_process import DecoderProcess
from pipeline.driver import run_work
from pipeline.encode_work import EncodeWork
from pipeline.plan import PlannedClip, ProbedVideo, plan_clips
from pipeline.types import EncodedClip, Frames, TensorBytes
from pipeline.video_writer import encode_video

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "configs" / "quickstart" / "clips" / "bunny_wakes_up.mp4"
SLEEP_SHARE = 1.5
BUCKET = "49x480x720@8"
FPS = 24


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 40
    with tempfile.TemporaryDirectory() as folder:
        videos = Path(folder, "videos")
        videos.mkdir()
        data = make_video()
        for number in range(count):
            (videos / f"{number:03d}.mp4").write_bytes(data)
        config = make_config(videos, Path(folder, "latents"))
        decode_s = measure_decoding(videos / "000.mp4", config)
        times = Path(folder, "times")
        times.mkdir()
        work = EncodeWork(config, make_engine=functools.partial(Sleeper, SLEEP_SHARE * decode_s, str(times)))
        start = time.perf_counter()
        assert run_work(work) == ExitCode.COMPLETE
        print(json.dumps(report(times, count, decode_s) | {"run_s": round(time.perf_counter() - start, 1)}))


def make_video() -> bytes:
    """Real pictures, forward and backward again, as long as one clip."""
    with av.open(str(SOURCE)) as container:
        frames = [frame.reformat(1280, 720, "rgb24").to_ndarray() for frame in container.decode(video=0)]
    there_and_back = frames + frames[-2:0:-1]
    num_frames = 49 * FPS // 8
    return encode_video((there_and_back[t % len(there_and_back)][None] for t in range(num_frames)), Fraction(FPS))


def make_config(videos: Path, output: Path) -> RunConfig:
    values: dict[str, dict[str, Any]] = {
        "input": {"uri": str(videos)},
        "output": {"uri": str(output)},
        "vae": {"weights": str(ROOT / "configs" / "quickstart" / "vae"), "dtype": "float32"},
        "clip": {"buckets": [BUCKET]},
        "cluster": {"actors": 1, "threads_per_actor": 1},
        "run": {"progress": "log"},
    }
    return RunConfig(**values)  # type: ignore[arg-type]


def measure_decoding(path: Path, config: RunConfig) -> float:
    """Seconds of one core for one clip: the median of five, the first left out."""
    seconds = []
    with DecoderProcess(DecodeConfig()) as decoder:
        info = decoder.probe(str(path), path.name)
        video = ProbedVideo(uri=str(path), size_bytes=path.stat().st_size, version="", columns={}, info=info)
        (planned,) = plan_clips([video], config.buckets, config.clip, "")
        assert isinstance(planned, PlannedClip), planned
        for _ in range(6):
            start = time.perf_counter()
            (frames,) = decoder.decode(str(path), path.name, [planned.clip])
            seconds.append(time.perf_counter() - start)
            assert isinstance(frames, np.ndarray), frames
    return statistics.median(seconds[1:])


class Sleeper:
    """An engine that holds its actor as a GPU's work would, and notes when."""

    def __init__(self, seconds: float, times: str, *load_arguments: object) -> None:
        self._seconds, self._times, self._calls = seconds, Path(times), 0

    def encode(self, clips: Sequence[Frames]) -> list[EncodedClip]:
        start = time.time()
        time.sleep(self._seconds * len(clips))
        latent = TensorBytes(data=bytes(16 * 13 * 60 * 90 * 4), shape=(16, 13, 60, 90), dtype="float32")
        (self._times / f"{self._calls:06d}.json").write_text(json.dumps([start, time.time(), len(clips)]))
        self._calls += 1
        return [EncodedClip(latent=latent, logvar=latent) for _ in clips]

    def is_out_of_memory(self, error: BaseException) -> bool:
        return False

    def tighten(self) -> str | None:
        return None

    def measure_psnr(self, frames: Frames, encoded: EncodedClip) -> float:
        raise NotImplementedError("the run asks for no quality")

    def decode(self, latents: Sequence[torch.Tensor]) -> Any:
        raise NotImplementedError("the run decodes nothing")

    decode_chunks = decode


def report(times: Path, count: int, decode_s: float) -> dict[str, Any]:
    calls = [json.loads(path.read_text()) for path in sorted(times.iterdir())]
    assert sum(clips for _, _, clips in calls) == count
    whole_s = calls[-1][1] - calls[0][0]
    gaps = sorted((later[0] - earlier[1] for earlier, later in itertools.pairwise(calls)), reverse=True)
    return {
        "bench": "pipeline",
        "clips": count,
        "decode_s_of_one_core": round(decode_s, 3),
        "model_s_a_clip": round(SLEEP_SHARE * decode_s, 3),
        "busy_share": round(sum(end - start for start, end, _ in calls) / whole_s, 4),
        "idle_s": round(sum(gaps), 3),
        "longest_gaps_s": [round(gap, 3) for gap in gaps[:5]],
        "median_gap_s": round(statistics.median(gaps), 4),
    }


if __name__ == "__main__":
    main()
