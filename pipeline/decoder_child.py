"""The child end of ``decoder_process``: limits itself, then answers requests until its input closes.

    python -m pipeline.decoder_child LIMITS_JSON PARENT_PID

Answers go to what was standard output; whatever a library prints goes to standard error instead.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import resource
import signal
import sys
import traceback
from dataclasses import asdict
from typing import Any, BinaryIO

from pipeline.config import DecodeConfig
from pipeline.errors import TerminalError, TransientError
from pipeline.types import Bucket, Crop
from pipeline.video import Window, decode_windows, probe, probe_header

_PR_SET_PDEATHSIG = 1
_TRACEBACK_CHARACTERS = 4000


def serve(limits: DecodeConfig, requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer requests, one JSON line each, in order."""
    _write(answers, {"ready": os.getpid()})
    for line in requests:
        request = json.loads(line)
        try:
            _answer(request, limits, answers)
        except BrokenPipeError:
            raise
        except TerminalError as error:
            _write(answers, {"error": _fields(error)})
        except TransientError as error:
            _write(answers, {"transient": str(error)})
        except MemoryError:
            _write(answers, {"out_of_memory": True})
        except Exception:
            detail = f"{request['name']}: {traceback.format_exc()[-_TRACEBACK_CHARACTERS:]}"
            _write(answers, {"error": _fields(TerminalError(request["operation"], "unexpected", detail))})


def _answer(request: dict[str, Any], limits: DecodeConfig, answers: BinaryIO) -> None:
    path, name = request["path"], request["name"]
    if request["operation"] == "probe":
        whole = request["header_of"]
        info = probe(path, limits, name=name) if whole is None else probe_header(path, limits, name=name, size_bytes=whole)
        _write(answers, {"info": asdict(info) if info else None})
        return
    windows = [
        Window(
            frame_start=window["frame_start"],
            frame_end=window["frame_end"],
            bucket=Bucket(**window["bucket"]),
            crop=Crop(**window["crop"]),
            header_size=tuple(window["header_size"]) if window["header_size"] else None,
        )
        for window in request["windows"]
    ]
    for index, result in decode_windows(path, windows, limits, name=name):
        if isinstance(result, TerminalError):
            _write(answers, {"index": index, "refused": _fields(result)})
        else:
            _write(answers, {"index": index}, result.data.cast("B"))
    _write(answers, {"done": True})


def _fields(error: TerminalError) -> dict[str, str]:
    return {"stage": error.stage, "reason": error.reason, "detail": error.detail}


def _write(answers: BinaryIO, header: dict[str, Any], payload: memoryview | None = None) -> None:
    answers.write(json.dumps(header).encode() + b"\n")
    if payload is not None:
        answers.write(payload)
    answers.flush()


def _limit_itself(limits: DecodeConfig, parent_pid: int) -> None:
    """Bound this process's memory and life; a crash leaves a stack trace on standard error, never a core file."""
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Not RLIMIT_AS: that one also counts mapped files and reserved address space.
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    allowed = limits.memory_bytes if hard == resource.RLIM_INFINITY else min(limits.memory_bytes, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (allowed, allowed))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent_pid:
            raise SystemExit("the parent is gone")


def main() -> None:
    limits = DecodeConfig.model_validate_json(sys.argv[1])
    _limit_itself(limits, int(sys.argv[2]))
    with open(os.dup(1), "wb") as answers:
        os.dup2(2, 1)
        serve(limits, sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()
