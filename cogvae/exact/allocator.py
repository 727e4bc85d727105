"""Gives memory that the C library keeps for later back to the system, on processors.

What a level of the network let go of stays with the process in pieces too small for the next level. It would come on
top of what that one holds: a quarter more at the peak.
"""

import ctypes
import functools
import sys
from collections.abc import Callable

from torch import Tensor

# Of one piece: below, there is too little to win.
_FROM_BYTES = 1 << 20


def release_freed(like: Tensor) -> None:
    """Returns free memory to the system where tensors of this kind lie in the C library's heap. Elsewhere does nothing."""
    if like.device.type == "cpu" and like.nbytes >= _FROM_BYTES:
        _find_trim()(0)


@functools.cache
def _find_trim() -> Callable[[int], object]:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    return trim or (lambda keep_bytes: None)  # musl has no such function, and no such heap
