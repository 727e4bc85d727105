"""What encoding does on its nodes before and beside the model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
from ray import cloudpickle

from pipeline import encode_worker
from pipeline.actors import Meter
from pipeline.config import DecodeConfig
from pipeline.errors import TerminalError, TransientError
from pipeline.storage import Storage
from tests.pipeline.fakes import FlakyFileSystem, make_clip
from tests.pipeline.test_admission import make_config

decode: Any = encode_worker.decode_videos._function  # type: ignore[attr-defined]


def test_a_file_that_is_not_there_is_its_clip_s_fault_only_where_the_shared_paths_are_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[float] = []
    monkeypatch.setattr(encode_worker.time, "sleep", held.append)
    clip = make_clip(0, uri=str(tmp_path / "gone.mp4")).clip
    result = decode([clip], DecodeConfig(), {}, (str(tmp_path),))
    assert isinstance(result, TerminalError)
    assert (result.reason, held) == ("not_found", [])
    with pytest.raises(TransientError, match="this node does not see /not/mounted, which all nodes must share"):
        decode([clip], DecodeConfig(), {}, (str(tmp_path), "/not/mounted"))
    assert held == [encode_worker._BLIND_NODE_S]


def test_an_actor_takes_the_driver_s_word_for_what_the_store_guarantees(flaky: type[FlakyFileSystem]) -> None:
    storage = Storage("flaky://out")
    spec = encode_worker.EncodeSpec(
        config=make_config(),
        storage=storage,
        recipe="r",
        columns=pa.schema([]),
        frame_budget_bytes=1,
        shared=(),
        make_engine=lambda: SimpleNamespace(tighten=None, is_out_of_memory=None),  # type: ignore[arg-type,return-value]
    )
    known = storage.has_conditional_put
    asked = len(flaky.calls)
    worker = encode_worker.EncodeWorker(cloudpickle.loads(cloudpickle.dumps(spec)), Meter())
    assert worker.storage.has_conditional_put == known
    assert (asked > 0, len(flaky.calls)) == (True, asked)
