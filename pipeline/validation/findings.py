"""What validation says: one line for each thing that is not as it should be."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

MOST_OF_ONE_FILE = 20
"""Findings that are told of one file; a file with more is broken, whatever else there is."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not as it should be."""

    path: str
    """Inside the output."""
    what: str
    """A short code to count by, such as ``missing`` or ``checksum``."""
    expected: str
    found: str

    def __str__(self) -> str:
        return f"{self.path}: {self.what}: expected {self.expected}; found {self.found}"


def first_findings(findings: Iterable[Finding]) -> Iterator[Finding]:
    """Those that are told of one file."""
    findings = iter(findings)
    last = None
    for last in islice(findings, MOST_OF_ONE_FILE):
        yield last
    if last is not None and (more := sum(1 for _ in findings)):
        yield Finding(last.path, "more", f"no more than {MOST_OF_ONE_FILE} findings", f"{more} further ones, not told")


def damaged(path: str, error: BaseException) -> Finding:
    """What cannot even be read."""
    message = str(error).removeprefix(f"{path}: ")
    return Finding(path, "damaged", "a file as this program writes it", f"{type(error).__name__}: {message}"[:500])
