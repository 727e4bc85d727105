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

import pyarrow as pa

from pipeline.account import Account
from pipeline.clip_planning import ClipPlanner
from pipeline.config import RunConfig
from pipeline.dataset import DatasetInfo, ShardWriter, build_row, build_schema, publish_dataset, shard_path
from pipeline.dataset.writer import DATA_FOLDER
from pipeline.engine import ModelInfo
from pipeline.errors import TerminalError
from pipeline.plan import PlannedClip, ProbedVideo
from pipeline.plan_rows import CLIP_ROWS
from pipeline.plan_store import Generation, ShardRef, read_generations, read_items, read_rejections, read_shards
from pipeline.plan_writer import GenerationWriter
from pipeline.planning import Batch
from pipeline.recipe import LatentRecipe
from pipeline.sources import SourceItem, SourceListing
from pipeline.stock import Stock
from pipeline.storage import Storage, StoredObject
from pipeline.types import Bucket, Clip, Crop, EncodedClip, ShardSummary, TensorBytes, VideoInfo

MODEL = ModelInfo(fingerprint="bench", latent_channels=16, spatial_ratio=8, temporal_ratio=4, scaling_factor=0.7)
BUCKETS = ("49x480x720@8", "49x720x480@8", "81x480x720@16")
BAD_EVERY, TWICE_EVERY, APPENDED, CLIPS_PER_SHARD = 100, 1000, 1000, 34


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


class CommittedStorage(Storage):
    """An output where every planned shard is committed; the shards are copies of one, and are not on disk."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        (self.generation, *_) = read_generations(self)
        self.shard = b""
        self.num_reads = 0

    def walk(self, folder: str, suffix: str = "") -> Iterator[StoredObject]:
        if folder != DATA_FOLDER:
            yield from super().walk(folder, suffix)
            return
        for shard in read_shards(self, self.generation):
            yield StoredObject(path_of(shard), len(self.shard), "v1")

    def size(self, path: str) -> int:
        return len(self.shard) if path.startswith(DATA_FOLDER) else super().size(path)

    def read_range(self, path: str, offset: int, length: int) -> bytes:
        if not path.startswith(DATA_FOLDER):
            return super().read_range(path, offset, length)
        self.num_reads += 1
        return self.shard[offset : offset + length]


@dataclass
class MadeUpWork:
    """Commits whose footers cost nothing: what is left is the driver's own time."""

    storage: CommittedStorage
    num_footers: int = 0

    commits = (DATA_FOLDER, ".parquet")

    def commit_path(self, shard: ShardRef) -> str:
        return path_of(shard)

    def read_summary(self, path: str, size_bytes: int) -> ShardSummary:
        self.num_footers += 1
        return make_summary(path.rpartition("-")[2].partition(".")[0], 40, 180_000_000)


def path_of(shard: ShardRef) -> str:
    return shard_path(shard.bucket_key, shard.index, shard.shard_id)


def make_summary(shard_id: str, num_rows: int, size_bytes: int) -> ShardSummary:
    identity = {"generation": 0, "index": 0, "bucket_key": BUCKETS[0], "attempt_id": "bench", "recipe": "bench"}
    return ShardSummary(shard_id=shard_id, num_rows=num_rows, size_bytes=size_bytes, **identity)  # type: ignore[arg-type]


def resume(folder: Path, clips: int) -> dict[str, Any]:
    """Two starts on an output where all is committed: without checkpoints, and with what the first wrote.

    The plan has as many shards as the clips would make; one clip stands for all of a shard's.
    """
    output = folder / "resume"
    _plan_shards(Storage(str(output)), max(1, clips // CLIPS_PER_SHARD))
    work = MadeUpWork(CommittedStorage(output))
    found: dict[str, Any] = {"shards": work.storage.generation.num_shards}
    for name in ("cold", "checkpointed"):
        work.num_footers, start, cpu = 0, time.perf_counter(), time.process_time()
        stock = Stock(work, Account())
        assert stock.take([work.storage.generation]) == []
        assert len(stock.committed) == work.storage.generation.num_shards
        found |= {f"{name}_s": round(time.perf_counter() - start, 1), f"{name}_cpu_s": round(time.process_time() - cpu, 1)}
        found |= {f"{name}_footers": work.num_footers}
    return found


def _plan_shards(storage: Storage, count: int) -> None:
    recipe = LatentRecipe(weights="w", dtype="bfloat16", tiling="exact", stored_dtype="bfloat16", logvar=True, first_frame=False)
    row = CLIP_ROWS.to_row(PlannedClip(clip=make_clip(0), columns={}))
    table = pa.Table.from_pylist([row], schema=CLIP_ROWS.schema)
    writer = GenerationWriter(storage, 0, CLIP_ROWS)
    writer.fix_columns(pa.schema([]))
    for number in range(count):
        writer.add_shard(f"{number:016x}", BUCKETS[0], table, [])
    writer.publish(recipe, {})


def publish(folder: Path, clips: int) -> dict[str, Any]:
    """Index, quarantine table, card and manifest from the plan's shards, forty small samples in each."""
    storage = CommittedStorage(folder)
    schema = build_schema(logvar=True, first_frame=False)
    with tempfile.TemporaryDirectory() as spool:
        storage.shard = _write_shard(Path(spool) / "shard.parquet", schema)
    shards = (path_of(shard) for shard in read_shards(storage, storage.generation))
    info = DatasetInfo(schema=schema, scaling_factor=0.7, dtype="bfloat16")
    manifest = publish_dataset(storage, shards, read_rejections(storage, storage.generation), info)
    assert manifest.num_samples == 40 * storage.generation.num_shards
    return {
        "shards": manifest.num_shards,
        "rows": manifest.num_samples,
        "reads": storage.num_reads,
        "index_files": len(manifest.index),
    }


def make_clip(number: int) -> Clip:
    return Clip(
        sample_id=f"{number:032x}",
        uri="s3://videos/a.mp4",
        size_bytes=1,
        version="1",
        bucket=Bucket.parse(BUCKETS[0]),
        frame_start=0,
        frame_end=49,
        crop=Crop(x=0, y=0, w=720, h=480),
        source_fps=8,
        source_width=720,
        source_height=480,
    )


def _write_shard(path: Path, schema: pa.Schema) -> bytes:
    tensor = TensorBytes(data=bytes(32 << 10), shape=(16, 1, 32, 32), dtype="bfloat16")
    with ShardWriter(path, schema) as writer:
        for number in range(40):
            writer.write(build_row(make_clip(number), EncodedClip(latent=tensor, logvar=tensor)))
        writer.close(make_summary("bench", 40, writer.size_bytes))
    return path.read_bytes()


def listing(folder: Path, clips: int) -> dict[str, Any]:
    """Walking a folder of so many committed shards as clips are planned, up to a million, on the local disk."""
    count = min(clips, 1_000_000)
    with tempfile.TemporaryDirectory(dir=folder.parent) as output:
        for number in range(count):
            path = Path(output, shard_path(BUCKETS[number % 3], number, f"{number:016x}"))
            if number < 3:
                path.parent.mkdir(parents=True)
            path.touch()
        storage, start = Storage(output), time.perf_counter()
        assert sum(1 for _ in storage.walk(DATA_FOLDER, ".parquet")) == count
        return {"shards": count, "walk_s": round(time.perf_counter() - start, 1)}


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


PARTS: dict[str, Callable[[Path, int], dict[str, Any]]] = {
    part.__name__: part for part in (plan, read, resume, publish, append, listing)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=200_000)
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=list(PARTS), help="in this order; read, publish and append need plan"
    )
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part is None:
        with tempfile.TemporaryDirectory() as temporary:
            for part in arguments.parts:
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
