"""What encoding does on its nodes before and beside the model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
from ray import cloudpickle

from pipeline import encode_worker
from pipeline.actors import Meter
from pipeline.config import DecodeConfig
from pipeline.dataset.writer import shard_path
from pipeline.errors import TerminalError, TransientError
from pipeline.messages import Lease
from pipeline.storage import Storage
from tests.pipeline.fakes import FlakyFileSystem, make_clip, make_shard_ref
from tests.pipeline.simulation import make_summary
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


def make_spec(storage: Storage) -> encode_worker.EncodeSpec:
    return encode_worker.EncodeSpec(
        config=make_config(),
        storage=storage,
        recipe="r",
        columns=pa.schema([]),
        superseded=frozenset(),
        frame_budget_bytes=1,
        shared=(),
        make_engine=lambda: SimpleNamespace(tighten=None, is_out_of_memory=None),  # type: ignore[arg-type,return-value]
    )


def test_an_actor_takes_the_driver_s_word_for_what_the_store_guarantees(flaky: type[FlakyFileSystem]) -> None:
    storage = Storage("flaky://out")
    spec = make_spec(storage)
    known = storage.has_conditional_put
    asked = len(flaky.calls)
    worker = encode_worker.EncodeWorker(cloudpickle.loads(cloudpickle.dumps(spec)), Meter())
    assert worker.storage.has_conditional_put == known
    assert (asked > 0, len(flaky.calls)) == (True, asked)


def test_a_shard_whose_commit_lost_its_reply_is_not_encoded_again(output: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    lease = Lease(shard=make_shard_ref(0), attempt=1, is_again=True)
    shard, summary = lease.shard, make_summary(lease)
    output.put(shard_path(shard.bucket_key, shard.index, shard.shard_id), b"its footer")
    monkeypatch.setattr(encode_worker, "read_summary", lambda storage, path: summary)
    worker = encode_worker.EncodeWorker(make_spec(output), Meter())
    with worker.open(lease) as job:
        job.run()
        assert job.commit() is summary
    with pytest.raises(FileNotFoundError), worker.open(replace(lease, is_again=False)):  # there is no plan to read
        pass
