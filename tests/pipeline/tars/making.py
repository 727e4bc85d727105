"""Tars written on the spot: WebDataset samples with real videos, and odd ones."""

from __future__ import annotations

import io
import json
import os
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any

from pipeline.clip_planning import ClipPlanner
from pipeline.decoder_process import DecoderProcess
from pipeline.engine import ModelInfo
from pipeline.outcomes import read_to_look_at_again
from pipeline.plan import ProbedVideo
from pipeline.plan_store import Generation, read_generations
from pipeline.planning import Batch
from pipeline.recipe import LatentRecipe
from pipeline.storage import Storage
from pipeline.tars.probing import probe_tar
from tests.pipeline.test_config import make_config

MODEL = ModelInfo(fingerprint="weights", latent_channels=16, spatial_ratio=8, temporal_ratio=4, scaling_factor=0.7)


def make_tar(members: Iterable[tuple[str, bytes]], *, format: int = tarfile.USTAR_FORMAT) -> bytes:
    """A tar of plain files, with its end mark."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return sink.getvalue()


def make_samples(videos: Iterable[bytes], *, first: int = 0, suffix: str = "mp4") -> list[tuple[str, bytes]]:
    """Members as img2dataset's kin write them: ``000012.json``, ``.mp4`` and ``.txt``."""
    members = []
    for number, video in enumerate(videos, start=first):
        facts = {"url": f"https://example.org/{number}.mp4", "views": number * 37, "tags": ["a", str(number)]}
        members += [
            (f"{number:06d}.json", json.dumps(facts).encode()),
            (f"{number:06d}.{suffix}", video),
            (f"{number:06d}.txt", f"clip number {number}, of something that moves".encode()),
        ]
    return members


def plan_tars(uri: str, output: Storage, *, requeued: bool = False, **settings: Any) -> tuple[Generation | None, list[str]]:
    """Plan an input as the driver does, with a real decoding process. Also the URIs of what was probed.

    Args:
        requeued: look again at what was requeued, instead of at the input.
    """
    config = make_config(input={"uri": uri, **settings}, output={"uri": output.uri}, clip={"buckets": ["9x32x48@8"]})
    probed: list[str] = []
    with DecoderProcess(config.decode) as decoder, tempfile.TemporaryDirectory() as folder:

        def probe(batches: list[Batch]) -> Iterator[tuple[int, list[ProbedVideo]]]:
            for position, (item,) in enumerate(batches):
                probed.append(item.uri)
                yield position, probe_tar(item, config.input.extensions, decoder, {}, folder)
            assert os.listdir(folder) == []  # nothing stays behind

        planner = ClipPlanner(
            config=config,
            storage=output,
            model=MODEL,
            recipe=LatentRecipe.from_config(config, MODEL.fingerprint),
            probe=probe,
            on_probed=lambda videos, total: None,
        )
        earlier = read_generations(output)
        if requeued:
            return planner.replan(earlier, read_to_look_at_again(output, earlier)), probed
        return planner.add_generation(earlier), probed
