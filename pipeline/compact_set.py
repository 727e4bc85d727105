"""A set of texts that keeps 16 bytes of each: ten million ids in 160 MB, where Python's own set takes over a gigabyte."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import xxhash

_HALF = (1 << 64) - 1
_FEWEST_RECENT = 1 << 16


class CompactSet:
    """Texts by their 128-bit hashes: a sorted array, and a small set of those that came since it was sorted."""

    def __init__(self) -> None:
        self._high: npt.NDArray[np.uint64] = np.empty(0, np.uint64)
        self._low: npt.NDArray[np.uint64] = np.empty(0, np.uint64)  # beside _high, in its order
        self._recent: set[int] = set()

    def __len__(self) -> int:
        return len(self._high) + len(self._recent)

    def __contains__(self, text: str) -> bool:
        return self._has(xxhash.xxh3_128_intdigest(text.encode("utf-8", "surrogatepass")))

    def add(self, text: str) -> bool:
        """Returns whether the text is new."""
        key = xxhash.xxh3_128_intdigest(text.encode("utf-8", "surrogatepass"))
        if self._has(key):
            return False
        self._recent.add(key)
        if len(self._recent) >= max(_FEWEST_RECENT, len(self._high) // 8):
            self._merge()
        return True

    def _has(self, key: int) -> bool:
        if key in self._recent:
            return True
        high, low = np.uint64(key >> 64), key & _HALF
        position = int(self._high.searchsorted(high))
        while position < len(self._high) and self._high[position] == high:
            if int(self._low[position]) == low:
                return True
            position += 1
        return False

    def _merge(self) -> None:
        recent = sorted(self._recent)
        self._recent.clear()
        high = np.array([key >> 64 for key in recent], np.uint64)
        low = np.array([key & _HALF for key in recent], np.uint64)
        places = self._high.searchsorted(high)
        self._high, self._low = np.insert(self._high, places, high), np.insert(self._low, places, low)
