"""What a decode task makes of a file that its node does not see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline import encode_worker
from pipeline.config import DecodeConfig
from pipeline.errors import TerminalError, TransientError
from tests.pipeline.fakes import make_clip

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
