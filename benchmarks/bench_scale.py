"""Time and peak memory of the driver's work by the size of the run: planning, appending, resuming, publishing.

Videos are made up and are looked at by nobody; what is measured is everything around that. Each part runs in a
process of its own, on a folder of the local disk, and checks what it made. Prints one JSON line a part.

    python benchmarks/bench_scale.py --clips 10000000
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.account import Account
from pipeline.clip_planning import ClipPlanner
from pipeline.config import RunConfig
from pipeline.engine import ModelInfo
from pipeline.errors import TerminalError
from pipeline.plan import ProbedVideo
from pipeline.plan_rows import CLIP_ROWS
from pipeline.plan_store import Generation, read_generations, read_items, read_rejections, read_shards
from pipeline.planning import Batch
from pipeline.recipe import LatentRecipe
from pipeline.sources import SourceItem, SourceListing
from pipeline.storage import Storage
from pipeline.types import VideoInfo

MODEL = ModelInfo(fingerprint="bench", latent_channels=16, spatial_ratio=8, temporal_ratio=4, scaling_factor=0.7)
BUCKETS = ("49x480x720@8", "49x720x480@8", "81x480x720@16")
BAD_EVERY, TWICE_EVERY, APPENDED = 100, 1000, 1000


@dataclass(slots=True, kw_only=True)
class MadeUpPlanner(ClipPlanner):
    """Lists and probes videos that do not exist: one in a hundred is none, one in a thousand is listed twice."""

    count: int = 0

    def list_input(self) -> SourceListing:
        return SourceListing(items=(made_up_item(number) for number in range(self.count)))


def made_up_item(number: int) -> SourceItem:
    number -= number % TWICE_EVERY == TWICE_EVERY - 1  # the one before, once more
    uri = f"s3://videos/{number // 10_000:05d}/clip-{number:08d}.mp4"
    return SourceItem(uri=uri, size_bytes=1_000_000 + number, version=f"{number:032x}")


def made_up_probe(batches: list[Batch]) -> Iterator[tuple[int, list[ProbedVideo]]]:
    for position, batch in enumerate(batches):
        yield position, [made_up_video(item) for item in batch]


def made_up_video(item: SourceItem) -> ProbedVideo:
    assert item.size_bytes is not None
    assert item.version is not None
    number = int(item.version, 16)
    is_bad = number % BAD_EVERY == 0
    info = VideoInfo(
        width=(1280, 720)[number % 2],
        height=(720, 1280)[number % 2],
        fps=30.0,
        duration_s=6.2 + number % 9973 / 1001,
        container="mp4",
        codec="h264",
    )
    return ProbedVideo(
        uri=item.uri,
        size_bytes=item.size_bytes,
        version=item.version,
        columns={"caption": f"a video of a rabbit that crosses a road, seen from above, take {number}", "score": number / 7},
        info=None if is_bad else info,
        error=TerminalError("probe", "not_a_video", f"{item.uri}: no video stream") if is_bad else None,
    )


def plan(folder: Path, clips: int) -> dict[str, Any]:
    generation = _plan(folder, clips)
    bad, twice = -(-clips // BAD_EVERY), clips // TWICE_EVERY
    assert (generation.num_clips, generation.quarantined, generation.filtered) == (clips - bad - twice, bad, twice)
    return {"clips": generation.num_clips, "shards": generation.num_shards, "disk_mb": _megabytes(folder)}


def append(folder: Path, clips: int) -> dict[str, Any]:
    """A second generation: the same listing again with a few new videos at its end."""
    generation = _plan(folder, clips + APPENDED)
    assert generation.num_planned == APPENDED
    return {"clips": generation.num_clips}


def read(folder: Path, clips: int) -> dict[str, Any]:
    """What a driver holds of the plan, and what a worker fetches of it."""
    storage = Storage(str(folder))
    (generation, *_) = read_generations(storage)
    shards = list(read_shards(storage, generation))
    account = Account()
    account.add_rejections(read_rejections(storage, generation))
    assert account.quarantined == generation.quarantined
    some = shards[:: max(1, len(shards) // 50)]
    start = time.perf_counter()
    assert all(len(read_items(storage, shard, CLIP_ROWS)) == shard.num_clips for shard in some)
    return {"shards": len(shards), "ms_per_shard_read": round((time.perf_counter() - start) / len(some) * 1e3, 2)}


def _plan(folder: Path, count: int) -> Generation:
    storage = Storage(str(folder))
    config = RunConfig(
        input={"uri": "s3://videos"},  # type: ignore[arg-type]
        output={"uri": str(folder)},  # type: ignore[arg-type]
        vae={"weights": "bench"},  # type: ignore[arg-type]
        clip={"buckets": BUCKETS},  # type: ignore[arg-type]
    )
    planner = MadeUpPlanner(
        config=config,
        storage=storage,
        model=MODEL,
        recipe=LatentRecipe.from_config(config, MODEL.fingerprint),
        probe=made_up_probe,
        on_probed=lambda videos, total: None,
        count=count,
    )
    generation = planner.add_generation(read_generations(storage))
    assert generation is not None
    return generation


def _megabytes(folder: Path) -> float:
    return round(sum(path.stat().st_size for path in folder.rglob("*.parquet")) / 1e6, 1)


PARTS: dict[str, Callable[[Path, int], dict[str, Any]]] = {"plan": plan, "read": read, "append": append}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=200_000)
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part is None:
        with tempfile.TemporaryDirectory() as temporary:
            for part in PARTS:
                place = ["--part", part, "--clips", str(arguments.clips), "--folder", str(arguments.folder or temporary)]
                subprocess.run([sys.executable, __file__, *place], check=True)
        return
    start = time.perf_counter()
    found = PARTS[arguments.part](arguments.folder, arguments.clips)
    seconds = round(time.perf_counter() - start, 1)
    cpu = resource.getrusage(resource.RUSAGE_SELF)
    used = {"s": seconds, "cpu_s": round(cpu.ru_utime + cpu.ru_stime, 1), "peak_rss_mb": cpu.ru_maxrss >> 10}
    print(json.dumps({"bench": "scale", "part": arguments.part, **used, **found}), flush=True)


if __name__ == "__main__":
    main()
