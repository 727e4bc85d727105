"""Names of videos: taken from the input, made fit for any file system, and used once."""

from __future__ import annotations

import re
import unicodedata

from pipeline.compact_set import CompactSet

_MAX_BYTES = 150  # with a suffix and a temporary name's addition, below every file system's 255
_SEPARATORS = re.compile(r"[/\\]+")


def clean_name(text: str) -> str:
    """A name without separators, control characters and leading dots, at most 150 bytes of UTF-8; it may be empty."""
    text = unicodedata.normalize("NFC", _SEPARATORS.sub("_", text))
    text = "".join(character for character in text if not unicodedata.category(character).startswith("C"))
    return _cut(text.strip().lstrip(". "), _MAX_BYTES)


class Names:
    """Gives names out, each once; names that differ in case only are one name, as on many disks."""

    def __init__(self) -> None:
        self._taken = CompactSet()

    def occupy(self, name: str) -> None:
        """A name that was given out before."""
        self._taken.add(_folded(name))

    def take(self, wanted: str, sample_id: str) -> str:
        """The cleaned name, or with ``-<start of sample_id>`` where it is in use or empty."""
        base = name = clean_name(wanted) or sample_id[:16]
        for length in (8, 16, len(sample_id)):
            if _folded(name) not in self._taken:
                break
            name = f"{_cut(base, _MAX_BYTES - length - 1)}-{sample_id[:length]}"
        self.occupy(name)
        return name


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _cut(text: str, size_bytes: int) -> str:
    return text.encode("utf-8", "ignore")[:size_bytes].decode("utf-8", "ignore").rstrip(". ")
