"""Milliseconds a sample, shuffled: our reader against one safetensors file a sample and pyarrow row groups.

64 samples of 2.25 MB (49x480x720 in bfloat16), warm page cache, one process. Outputs are compared first; the
contenders take turns, and the median of the rounds counts. Prints one JSON line.
"""

from __future__ import annotations

import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file

from pipeline.dataset import DatasetInfo, LatentDataset, ShardWriter, build_row, build_schema, publish_dataset, shard_path
from pipeline.storage import Storage
from pipeline.types import Bucket, Clip, Crop, EncodedClip, ShardSummary, TensorBytes

SAMPLES, SHAPE, ROUNDS = 64, (16, 13, 60, 90), 9
BUCKET = Bucket.parse("49x480x720@8")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        latents = [torch.randn(SHAPE).to(torch.bfloat16) for _ in range(SAMPLES)]
        for number, latent in enumerate(latents):
            save_file({"latent": latent}, f"{folder}/{number}.safetensors")
        write_dataset(folder, latents)
        verified, plain = LatentDataset(folder), LatentDataset(folder, verify=False)
        contenders: dict[str, Callable[[int], torch.Tensor]] = {
            "ours": lambda i: plain[i]["latent"],
            "ours, hash checked once": lambda i: verified[i]["latent"],
            "safetensors": lambda i: load_file(f"{folder}/{i}.safetensors")["latent"],
            "pyarrow row groups": row_group_reader(folder),
        }
        for name, read in contenders.items():
            assert all(torch.equal(read(i), latent) for i, latent in enumerate(latents)), name
        rounds: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(ROUNDS):
            for name, read in contenders.items():
                order = random.sample(range(SAMPLES), SAMPLES)
                start = time.perf_counter()
                for first in range(0, SAMPLES, 4):
                    torch.stack([read(i) for i in order[first : first + 4]])
                rounds[name].append((time.perf_counter() - start) / SAMPLES * 1e3)
        milliseconds = {name: round(statistics.median(times), 3) for name, times in rounds.items()}
        ratio = round(milliseconds["safetensors"] / milliseconds["ours"], 2)
        print(json.dumps({"bench": "reader", "ms_per_sample": milliseconds, "times_as_fast_as_safetensors": ratio}))


def write_dataset(folder: str, latents: list[torch.Tensor]) -> None:
    schema, storage = build_schema(logvar=False, first_frame=False), Storage(folder)
    spool = Path(folder) / "spool.parquet"
    with ShardWriter(spool, schema) as writer:
        for number, latent in enumerate(latents):
            data = latent.view(torch.uint8).numpy().tobytes()
            tensor = TensorBytes(data=data, shape=SHAPE, dtype="bfloat16")
            writer.write(build_row(make_clip(number), EncodedClip(latent=tensor)))
        summary = ShardSummary(
            shard_id="bench",
            generation=0,
            index=0,
            bucket_key=BUCKET.key,
            attempt_id="bench",
            recipe="bench",
            num_rows=writer.num_rows,
            size_bytes=writer.size_bytes,
        )
        writer.close(summary)
    path = shard_path(BUCKET.key, 0, "bench")
    storage.put_file_if_absent(path, spool)
    publish_dataset(storage, [path], [], DatasetInfo(schema=schema, scaling_factor=0.7, dtype="bfloat16"))


def make_clip(number: int) -> Clip:
    return Clip(
        sample_id=f"{number:032x}",
        uri="bench.mp4",
        size_bytes=1,
        version="1",
        bucket=BUCKET,
        frame_start=0,
        frame_end=49,
        crop=Crop(x=0, y=0, w=720, h=480),
        source_fps=8,
        source_width=720,
        source_height=480,
    )


def row_group_reader(folder: str) -> Callable[[int], torch.Tensor]:
    """What a reader without page offsets does: fetch the row group that holds the row."""
    file = pq.ParquetFile(Path(folder) / shard_path(BUCKET.key, 0, "bench"))
    groups = [file.metadata.row_group(number).num_rows for number in range(file.metadata.num_row_groups)]
    starts = np.cumsum([0, *groups])

    def read(index: int) -> torch.Tensor:
        group = int(np.searchsorted(starts, index, "right")) - 1
        column = file.read_row_group(group, columns=["vae_latent_bytes"])["vae_latent_bytes"]
        data = bytearray(column[index - starts[group]].as_buffer())
        return torch.frombuffer(data, dtype=torch.bfloat16).view(SHAPE)

    return read


if __name__ == "__main__":
    main()
