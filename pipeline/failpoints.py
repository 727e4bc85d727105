"""Named places at which a test makes a process die, raise or hang, to see that nothing is lost there.

``FAILPOINTS="commit.before_put=kill@2"`` kills the process with SIGKILL the second time it comes there; several are
separated by commas. Actions: ``kill``, ``exit``, ``raise`` (``raise:ENOSPC`` an OSError of that number), ``stall`` (this
thread) and ``freeze`` (the process, by SIGSTOP).
``FAILPOINTS_MARK=/path`` makes them fire once among all processes that share the file. Unarmed, a place costs one look
into an empty dictionary.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from typing import NoReturn

_armed: dict[str, tuple[str, int]] = {}
_STALL_S = 3600.0


class FailpointError(RuntimeError):
    """What ``raise`` raises."""


def arm(text: str) -> None:
    """Set the places that fail from now on, written as the environment variable has them; none for an empty text."""
    _armed.clear()
    for entry in filter(None, text.split(",")):
        point, _, action = entry.partition("=")
        action, _, count = action.partition("@")
        _armed[point] = (action, int(count or 1))


def reach(point: str) -> None:
    """Fail here if a test asked for it."""
    if not _armed or point not in _armed:
        return
    action, left = _armed[point]
    _armed[point] = (action, left - 1)
    if left == 1 and _is_first():
        _fire(point, action)


def _is_first() -> bool:
    mark = os.environ.get("FAILPOINTS_MARK")
    if mark is None:
        return True
    try:
        os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def _fire(point: str, action: str) -> None:
    name, _, detail = action.partition(":")
    if name == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif name == "exit":
        os._exit(1)
    elif name == "stall":
        time.sleep(_STALL_S)
    elif name == "freeze":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif name == "raise":
        _raise(point, detail)
    else:
        raise ValueError(f"FAILPOINTS: {point}={action}: actions are kill, exit, raise, stall and freeze")


def _raise(point: str, detail: str) -> NoReturn:
    if detail:
        number = int(getattr(errno, detail))
        raise OSError(number, os.strerror(number))
    raise FailpointError(f"failpoint {point}")


arm(os.environ.get("FAILPOINTS", ""))
