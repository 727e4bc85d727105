"""Decoding in a child process, so that a codec that crashes, hangs or eats memory costs one video and no worker.

The child (``decoder_child``) handles one request at a time and lives on between videos, until one gives trouble: a
child that met a bad file is not used for another. This module never loads PyAV.

    parent -> child   one JSON line: {"operation": "probe" | "decode", "path", "name", "windows", "header_of"}
    child -> parent   one JSON line an answer: {"info"} | {"index"} and the frames' bytes | {"index", "error"} | {"done"}
                      or, for the video as a whole, {"error"} | {"transient"} | {"out_of_memory"}

    what happens to the child                                what the caller sees
    its own doing: SEGV, ABRT, an exit, time, memory    ->   the video once more in a fresh child, then TerminalError
    from outside: SIGKILL, SIGTERM, cannot be started   ->   TransientError
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, NoReturn, Self

import numpy as np

from pipeline.config import DecodeConfig
from pipeline.errors import TerminalError, TransientError
from pipeline.types import Clip, Frames, VideoInfo

_log = logging.getLogger(__name__)

_PACKAGE_ROOT = Path(__file__).resolve().parents[1]
_KEPT_VARIABLES = ("PATH", "HOME", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "VIRTUAL_ENV")
"""All that the child inherits: credentials of storage and hub stay out of reach of a video file."""
_START_TIMEOUT_S = 120.0
_EXIT_TIMEOUT_S = 10.0
_PIPE_BYTES = 1 << 20
_LINE_BYTES = 1 << 20
_STDERR_BYTES = 2000
_OUTSIDE_SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
"""Signals that no decoder raises against itself; after all others, and after an exit, the video is a suspect."""

Operation = Literal["probe", "decode"]


class DecoderProcess:
    """Probes and decodes videos, one at a time, out of this process. Not for use by several threads at once.

    On Linux the child dies with the thread that started it (PR_SET_PDEATHSIG is bound to threads); an idle child that is
    gone is replaced without a word.
    """

    def __init__(self, limits: DecodeConfig) -> None:
        self._limits = limits
        self._child: _Child | None = None

    def probe(self, path: str, name: str) -> VideoInfo:
        """What ``video.probe`` finds.

        Args:
            path: absolute path of a local file.
            name: what messages call the file.

        Raises:
            TerminalError: the video is refused, or cost two children their lives.
            TransientError: the file cannot be read at the moment, or something outside ended the child.
        """
        answer = self._insist("probe", path, name)
        assert isinstance(answer, VideoInfo)
        return answer

    def probe_header(self, path: str, name: str, size_bytes: int) -> VideoInfo | None:
        """What ``video.probe_header`` finds in the header of a video of ``size_bytes``. Raises: as ``probe``."""
        answer = self._insist("probe", path, name, header_of=size_bytes)
        assert not isinstance(answer, list)
        return answer

    def decode(self, path: str, name: str, clips: Sequence[Clip]) -> list[Frames | TerminalError]:
        """The frames of each clip, RGB ``[T, H, W, 3]``, or why this one clip cannot be had.

        Raises:
            TerminalError: the video as a whole is refused, or cost two children their lives.
            TransientError: the file cannot be read at the moment, or something outside ended the child.
        """
        answer = self._insist("decode", path, name, clips)
        assert isinstance(answer, list)
        return answer

    def close(self) -> None:
        """End the child. The next request would start another."""
        if self._child is not None:
            self._child.kill()
            self._child = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        """Process id of the child, if there is one."""
        return None if self._child is None else self._child.pid

    def _insist(
        self, operation: Operation, path: str, name: str, clips: Sequence[Clip] = (), *, header_of: int | None = None
    ) -> VideoInfo | list[Frames | TerminalError] | None:
        request = _request(operation, path, name, clips, header_of)
        try:
            return self._ask(request, None if operation == "probe" else clips)
        except _SuspectError as trouble:
            _log.warning("decoder failed video=%s reason=%s problem=%s; once more alone", name, trouble.reason, trouble.problem)
        try:
            return self._ask(request, None if operation == "probe" else clips)
        except _SuspectError as trouble:
            raise TerminalError(operation, trouble.reason, f"{name}: {trouble.problem}; twice, the second time alone") from None

    def _ask(self, request: bytes, clips: Sequence[Clip] | None) -> VideoInfo | list[Frames | TerminalError] | None:
        child = self._ready_child()
        try:
            child.send(request, time.monotonic() + self._limits.timeout_s)
            answer = child.read_info() if clips is None else child.read_clips(clips)
        except BaseException:
            self.close()
            raise
        if isinstance(answer, list) and any(isinstance(result, TerminalError) for result in answer):
            self.close()
        return answer

    def _ready_child(self) -> _Child:
        if self._child is not None and not self._child.is_alive:
            self.close()
        if self._child is None:
            self._child = _Child(self._limits)
            try:
                self._child.await_start()
            except BaseException:
                self.close()
                raise
        return self._child


class _SuspectError(Exception):
    """The child came to grief over a video, by its own doing."""

    def __init__(self, reason: str, problem: str) -> None:
        super().__init__(reason, problem)
        self.reason = reason
        self.problem = problem


class _Child:
    """One child process and the pipes to it."""

    def __init__(self, limits: DecodeConfig) -> None:
        self._limits = limits
        self._deadline = time.monotonic() + _START_TIMEOUT_S
        self._answer = bytearray()
        self._stderr = b""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pipeline.decoder_child", limits.model_dump_json(), str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            cwd=_PACKAGE_ROOT,
            env=_environment(),
            # Ctrl-C on a terminal goes to the whole group; the driver decides what happens to running work.
            start_new_session=True,
        )
        self._stdin, self._stdout = _pipe(self._process.stdin), _pipe(self._process.stdout)
        self._errors = _pipe(self._process.stderr)
        self._readers = selectors.DefaultSelector()
        self._readers.register(self._stdout, selectors.EVENT_READ)
        self._readers.register(self._errors, selectors.EVENT_READ)
        self._writer = selectors.DefaultSelector()
        self._writer.register(self._stdin, selectors.EVENT_WRITE)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        """End the process and give back its pipes."""
        self._process.kill()
        self._process.wait()
        self._readers.close()
        self._writer.close()
        for end in (self._process.stdin, self._process.stdout, self._process.stderr):
            if end is not None:
                end.close()

    def await_start(self) -> None:
        """Raises: TransientError: the child does not come up."""
        try:
            self._read_line()
        except _SuspectError as trouble:
            raise TransientError(f"the decoding process does not start: {trouble.problem}") from None

    def send(self, request: bytes, deadline: float) -> None:
        """Send a request; it and its answers must be through by the deadline (of the monotonic clock)."""
        self._deadline = deadline
        view = memoryview(request)
        while view:
            if not self._writer.select(self._remaining_s()):
                continue
            try:
                view = view[os.write(self._stdin, view) :]
            except BlockingIOError:
                continue
            except BrokenPipeError:
                self._raise_death()

    def read_info(self) -> VideoInfo | None:
        info = self._read_answer()["info"]
        return None if info is None else VideoInfo(**info)

    def read_clips(self, clips: Sequence[Clip]) -> list[Frames | TerminalError]:
        results: dict[int, Frames | TerminalError] = {}
        while "done" not in (answer := self._read_answer()):
            index = answer["index"]
            if "refused" in answer:
                results[index] = TerminalError(**answer["refused"])
            else:
                bucket = clips[index].bucket
                frames = np.empty((bucket.num_frames, bucket.height, bucket.width, 3), np.uint8)
                self._read_into(frames.data.cast("B"))
                results[index] = frames
        return [results[index] for index in range(len(clips))]

    def _read_answer(self) -> dict[str, Any]:
        """The next answer. Raises: what it says about the video as a whole."""
        answer: dict[str, Any] = json.loads(self._read_line())
        if "error" in answer:
            raise TerminalError(**answer["error"])
        if "transient" in answer:
            raise TransientError(answer["transient"])
        if "out_of_memory" in answer:
            raise _SuspectError("out_of_memory", f"needs more than decode.memory_bytes ({self._limits.memory_bytes})")
        return answer

    def _read_line(self) -> bytes:
        while (end := self._answer.find(b"\n")) < 0:
            if len(self._answer) > _LINE_BYTES:
                raise _SuspectError("decoder_crashed", "the decoding process answers nonsense")
            self._await_answer()
            piece = os.read(self._stdout, 1 << 16)
            if not piece:
                self._raise_death()
            self._answer += piece
        line = bytes(self._answer[:end])
        del self._answer[: end + 1]
        return line

    def _read_into(self, target: memoryview) -> None:
        early = min(len(target), len(self._answer))
        target[:early] = self._answer[:early]
        del self._answer[:early]
        target = target[early:]
        while target:
            self._await_answer()
            received = os.readv(self._stdout, [target])
            if received == 0:
                self._raise_death()
            target = target[received:]

    def _await_answer(self) -> None:
        """Wait until there is something to read, keeping the end of what comes on stderr meanwhile."""
        while True:
            ready = {key.fd for key, _ in self._readers.select(self._remaining_s())}
            if self._errors in ready and not self._keep_errors():
                self._readers.unregister(self._errors)
            if self._stdout in ready:
                return

    def _remaining_s(self) -> float:
        remaining_s = self._deadline - time.monotonic()
        if remaining_s <= 0:
            raise _SuspectError("timed_out", f"not done after decode.timeout_s ({self._limits.timeout_s:g} s)")
        return remaining_s

    def _raise_death(self) -> NoReturn:
        """Raises: what the end of the child means. Its pipes are closed, so it is over or about to be."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_EXIT_TIMEOUT_S)
        code = self._process.returncode
        if code is None or code == 0 or -code in _OUTSIDE_SIGNALS:
            cause = "closed its pipe" if code is None or code == 0 else f"was ended from outside by {signal.Signals(-code).name}"
            raise TransientError(f"the decoding process {cause}")
        how = f"died of {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
        raise _SuspectError("decoder_crashed", f"the decoding process {how}{self._last_words()}")

    def _keep_errors(self) -> bool:
        """Read from standard error and keep the end of it. False when there is nothing more."""
        try:
            piece = os.read(self._errors, 1 << 16)
        except BlockingIOError:
            return False
        self._stderr = (self._stderr + piece)[-_STDERR_BYTES:]
        return bool(piece)

    def _last_words(self) -> str:
        while self._keep_errors():
            pass
        words = self._stderr.decode(errors="replace").strip()
        return f": {words}" if words else ""


def _pipe(end: IO[bytes] | None) -> int:
    """The descriptor of a pipe, widened where the system lets us: a clip is tens of megabytes."""
    assert end is not None
    with contextlib.suppress(AttributeError, OSError):
        fcntl.fcntl(end, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    os.set_blocking(end.fileno(), False)
    return end.fileno()


def _environment() -> dict[str, str]:
    kept = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    search_path = [str(_PACKAGE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    # numpy's linear algebra would start a thread a core, and each reserves memory.
    return {**kept, "PYTHONPATH": os.pathsep.join(search_path), "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


def _request(operation: Operation, path: str, name: str, clips: Sequence[Clip], header_of: int | None) -> bytes:
    windows = [
        {
            "frame_start": clip.frame_start,
            "frame_end": clip.frame_end,
            "bucket": asdict(clip.bucket),
            "crop": asdict(clip.crop),
            "header_size": clip.header_size,
        }
        for clip in clips
    ]
    request = {"operation": operation, "path": path, "name": name, "windows": windows, "header_of": header_of}
    return json.dumps(request).encode() + b"\n"
