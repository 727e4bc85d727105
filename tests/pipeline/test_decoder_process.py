"""The decoding child: same answers as in this process, and what its death, hang or hunger means."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from pipeline.config import DecodeConfig
from pipeline.decoder_process import DecoderProcess, _Child
from pipeline.errors import TerminalError, TransientError
from pipeline.geometry import cover_crop
from pipeline.types import Bucket, Clip
from pipeline.video import decode_windows, probe
from pipeline.video_file import REASONS
from tests.pipeline.video_samples import read_numbers, write_video

LIMITS = DecodeConfig(timeout_s=30)
BUCKET = Bucket.parse("9x96x160@8")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("videos") / "plain.mp4", num_frames=60)


@pytest.fixture
def decoder() -> Iterator[DecoderProcess]:
    with DecoderProcess(LIMITS) as process:
        yield process


def clip(bucket: Bucket = BUCKET, start: int = 0) -> Clip:
    return Clip(
        sample_id=f"s{start}",
        uri="file:///plain.mp4",
        size_bytes=1,
        version="",
        bucket=bucket,
        frame_start=start,
        frame_end=start + bucket.num_frames,
        crop=cover_crop(160, 96, bucket),
        source_fps=8,
        source_width=160,
        source_height=96,
    )


class Sabotaged(DecoderProcess):
    """Does something to each child just before it gets its request, a limited number of times."""

    def __init__(self, limits: DecodeConfig, sabotage: Callable[[int], None], times: int) -> None:
        super().__init__(limits)
        self._sabotage, self._times_left = sabotage, times
        self.pids: list[int] = []

    def _ready_child(self) -> _Child:
        child = super()._ready_child()
        self.pids.append(child.pid)
        if self._times_left > 0:
            self._times_left -= 1
            self._sabotage(child.pid)
        return child


def sends(number: signal.Signals) -> Callable[[int], None]:
    return lambda pid: os.kill(pid, number)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# Answers


def test_the_child_finds_and_cuts_what_this_process_would(decoder: DecoderProcess, video: Path) -> None:
    assert decoder.probe(str(video), video.name) == probe(str(video), LIMITS, name=video.name)
    clips = [clip(), clip(start=20), clip(Bucket.parse("17x256x256@8"), start=5)]
    direct = dict(decode_windows(str(video), clips, LIMITS, name=video.name))
    for index, result in enumerate(decoder.decode(str(video), video.name, clips)):
        assert isinstance(result, np.ndarray)
        assert result.flags.c_contiguous
        np.testing.assert_array_equal(result, direct[index])


def test_one_clip_may_be_refused_and_the_others_delivered(decoder: DecoderProcess, video: Path) -> None:
    good, bad = decoder.decode(str(video), video.name, [clip(), clip(start=55)])
    assert not isinstance(good, TerminalError)
    assert read_numbers(good) == list(range(9))
    assert isinstance(bad, TerminalError)
    assert (bad.stage, bad.reason) == ("decode", "too_few_frames")
    assert "plain.mp4: decoded 5 frames, need 9" in bad.detail


def test_a_refused_video_raises_its_reason(decoder: DecoderProcess, tmp_path: Path) -> None:
    (path := tmp_path / "text.mp4").write_text("hello " * 100)
    with pytest.raises(TerminalError, match=r"their_name\.mp4") as caught:
        decoder.probe(str(path), "their_name.mp4")
    assert (caught.value.stage, caught.value.reason) == ("probe", "not_a_video")
    with pytest.raises(TerminalError) as caught:
        decoder.decode(str(path), "their_name.mp4", [clip()])
    assert (caught.value.stage, caught.value.reason) == ("decode", "not_a_video")


def test_a_file_that_cannot_be_read_is_transient(decoder: DecoderProcess, tmp_path: Path) -> None:
    with pytest.raises(TransientError, match=r"gone\.mp4: cannot be read"):
        decoder.probe(str(tmp_path / "gone.mp4"), "gone.mp4")


def test_an_exception_of_our_own_making_arrives_with_its_traceback(decoder: DecoderProcess) -> None:
    with pytest.raises(TerminalError) as caught:
        decoder.probe("relative.mp4", "relative.mp4")
    assert caught.value.reason == "unexpected"
    assert "Traceback" in caught.value.detail
    assert "not an absolute path" in caught.value.detail


def test_no_clips_give_no_frames(decoder: DecoderProcess, video: Path) -> None:
    assert decoder.decode(str(video), video.name, []) == []


# The child's life


def test_a_child_serves_many_videos_until_one_is_bad(decoder: DecoderProcess, video: Path, tmp_path: Path) -> None:
    assert decoder.pid is None, "no child before it is needed"
    decoder.probe(str(video), video.name)
    first = decoder.pid
    decoder.decode(str(video), video.name, [clip()])
    assert decoder.pid == first
    (bad := tmp_path / "bad.mp4").write_bytes(b"bad" * 1000)
    with pytest.raises(TerminalError):
        decoder.probe(str(bad), bad.name)
    decoder.probe(str(video), video.name)
    assert decoder.pid not in (None, first)


def test_close_ends_the_child_and_the_next_request_starts_another(video: Path) -> None:
    decoder = DecoderProcess(LIMITS)
    decoder.probe(str(video), video.name)
    pid = decoder.pid
    assert pid is not None
    decoder.close()
    assert not is_running(pid)
    assert decoder.pid is None
    decoder.probe(str(video), video.name)
    decoder.close()
    decoder.close()


def test_an_idle_child_that_is_gone_is_replaced_without_a_word(decoder: DecoderProcess, video: Path) -> None:
    decoder.probe(str(video), video.name)
    assert decoder.pid is not None
    os.kill(decoder.pid, signal.SIGKILL)
    while is_running(decoder.pid):
        time.sleep(0.01)
    assert decoder.probe(str(video), video.name).width == 160


def test_the_child_dies_with_its_parent(video: Path) -> None:
    script = (
        "import sys, time; from pipeline.config import DecodeConfig; from pipeline.decoder_process import DecoderProcess\n"
        "d = DecoderProcess(DecodeConfig()); d.probe(sys.argv[1], 'v'); print(d.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", script, str(video)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    with parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        os.kill(pid, signal.SIGSTOP)  # a child that hangs would not notice that its input closed
        parent.kill()
    deadline = time.monotonic() + 10
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_running(pid)


def test_the_child_is_limited_and_sees_no_credentials(
    decoder: DecoderProcess, video: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "MY_SECRET", "API_KEY"):
        monkeypatch.setenv(name, "xyzzy")
    decoder.probe(str(video), video.name)
    process = Path(f"/proc/{decoder.pid}")
    assert b"xyzzy" not in (process / "environ").read_bytes()
    limits = {line[:26].strip(): line[26:].split()[:2] for line in (process / "limits").read_text().splitlines()}
    assert limits["Max core file size"] == ["0", "0"]
    assert limits["Max data size"] == [str(LIMITS.memory_bytes)] * 2


def test_the_child_starts_from_any_directory(video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('the wrong module')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    with DecoderProcess(LIMITS) as decoder:
        assert decoder.probe(str(video), video.name).height == 96


# Death, hang and hunger


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS])
def test_a_crash_is_tried_once_more_in_a_fresh_child(video: Path, number: signal.Signals) -> None:
    with Sabotaged(LIMITS, sends(number), times=1) as decoder:
        assert decoder.probe(str(video), video.name).width == 160
        assert len(set(decoder.pids)) == 2


def test_two_crashes_condemn_the_video(video: Path) -> None:
    with Sabotaged(LIMITS, sends(signal.SIGSEGV), times=2) as decoder:
        with pytest.raises(TerminalError) as caught:
            decoder.decode(str(video), video.name, [clip()])
        assert (caught.value.stage, caught.value.reason) == ("decode", "decoder_crashed")
        assert "plain.mp4: the decoding process died of SIGSEGV" in caught.value.detail
        assert decoder.pid is None
        assert decoder.probe(str(video), video.name).width == 160, "the next video gets a fresh child"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_an_end_from_outside_is_never_charged_to_the_video(video: Path, number: signal.Signals) -> None:
    with Sabotaged(LIMITS, sends(number), times=1) as decoder:
        with pytest.raises(TransientError, match=number.name):
            decoder.probe(str(video), video.name)
        assert len(decoder.pids) == 1


def test_a_hang_is_ended_and_tried_once_more(video: Path) -> None:
    with Sabotaged(DecodeConfig(timeout_s=1), sends(signal.SIGSTOP), times=1) as decoder:
        assert decoder.probe(str(video), video.name).width == 160
        assert not is_running(decoder.pids[0])


def test_two_hangs_condemn_the_video(video: Path) -> None:
    with Sabotaged(DecodeConfig(timeout_s=0.3), sends(signal.SIGSTOP), times=2) as decoder:
        with pytest.raises(TerminalError) as caught:
            decoder.probe(str(video), video.name)
        assert (caught.value.stage, caught.value.reason) == ("probe", "timed_out")
        assert "plain.mp4: not done after decode.timeout_s (0.3 s)" in caught.value.detail
        assert not any(is_running(pid) for pid in decoder.pids)


def test_a_request_larger_than_a_pipe_cannot_hang_the_parent(video: Path) -> None:
    with Sabotaged(DecodeConfig(timeout_s=0.5), sends(signal.SIGSTOP), times=2) as decoder:
        with pytest.raises(TerminalError) as caught:
            decoder.decode(str(video), video.name, [clip()] * 20_000)
        assert caught.value.reason == "timed_out"


def test_a_video_slower_than_the_clock_is_given_up_in_the_middle(tmp_path: Path) -> None:
    path = write_video(tmp_path / "slow.mp4", num_frames=60, size=(1280, 720))
    with DecoderProcess(DecodeConfig(timeout_s=0.15)) as decoder:
        with pytest.raises(TerminalError) as caught:
            decoder.decode(str(path), path.name, [clip(Bucket.parse("49x720x1280@8"))] * 8)
        assert caught.value.reason == "timed_out"


def test_a_video_that_needs_too_much_memory_is_refused(video: Path) -> None:
    with DecoderProcess(DecodeConfig(memory_bytes=256 << 20)) as decoder:
        with pytest.raises(TerminalError) as caught:
            decoder.decode(str(video), video.name, [clip(Bucket.parse("49x1536x1536@8"))])
        assert (caught.value.stage, caught.value.reason) == ("decode", "out_of_memory")
        assert "decode.memory_bytes (268435456)" in caught.value.detail
        assert decoder.probe(str(video), video.name).width == 160


def test_a_child_that_cannot_start_is_nobodys_fault(video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with DecoderProcess(LIMITS) as decoder, pytest.raises(TransientError, match="does not start"):
        decoder.probe(str(video), video.name)


def test_reasons_of_the_parent_stand_in_the_common_list() -> None:
    assert {"decoder_crashed", "timed_out", "out_of_memory", "unexpected"} <= set(REASONS)
