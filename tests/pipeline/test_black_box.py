"""What a process leaves behind when it dies: the clips in hand always, a trace when it died of its own doing."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.black_box import read_box
from pipeline.messages import AtWork

_DIES = """
import os, sys
from pathlib import Path
from pipeline.black_box import BlackBox, scratch_path
from pipeline.messages import AtWork
box = BlackBox(Path(sys.argv[1]))
scratch_path(box.path, "second.parquet").touch()
box.note(AtWork(attempt_id="first", clips=("a", "a longer name")))
box.note(AtWork(attempt_id="second", clips=("b",)))
os.kill(os.getpid(), int(sys.argv[2]))
"""


@pytest.mark.parametrize(
    ("number", "trace"), [(signal.SIGSEGV, "Segmentation fault"), (signal.SIGABRT, "Aborted"), (signal.SIGKILL, "")]
)
def test_a_fatal_signal_leaves_its_trace_and_a_kill_leaves_none(tmp_path: Path, number: int, trace: str) -> None:
    path = tmp_path / "actor.box"
    result = subprocess.run([sys.executable, "-c", _DIES, str(path), str(int(number))], capture_output=True, check=False)
    assert result.returncode == -number
    contents = read_box(path)
    assert contents.at_work == AtWork(attempt_id="second", clips=("b",))
    assert trace in contents.trace
    assert bool(contents.trace) == bool(trace)
    assert list(tmp_path.iterdir()) == []


def test_an_actor_that_ends_in_order_leaves_nothing(tmp_path: Path) -> None:
    code = _DIES.replace("os.kill(os.getpid(), int(sys.argv[2]))", "box.close()")
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "actor.box"), "0"], check=True)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError):
        read_box(tmp_path / "actor.box")


def test_a_box_without_a_note_names_nothing(tmp_path: Path) -> None:
    code = "\n".join(line for line in _DIES.splitlines() if "note(" not in line)
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "actor.box"), "9"], check=False)
    assert read_box(tmp_path / "actor.box").at_work is None
