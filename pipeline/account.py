"""What became of every planned clip, and the exit code that follows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum

from pipeline.types import Rejection


class ExitCode(IntEnum):
    COMPLETE = 0
    FAILED = 1
    USAGE = 2
    OVER_MAX_QUARANTINED = 3
    STOPPED = 4
    """Stopped before the end; the same command resumes."""


LeftOut = Mapping[tuple[str, str], int]
"""How many items were left out, by status and reason."""


def count_left_out(rejections: Iterable[Rejection]) -> LeftOut:
    return Counter((rejection.status, rejection.reason) for rejection in rejections)


@dataclass(slots=True)
class Account:
    """``planned = written + quarantined + filtered + pending``, added up as shards are committed."""

    planned: int = 0
    written: int = 0
    quarantined: int = 0
    filtered: int = 0
    size_bytes: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    """How often each reason, of quarantined and filtered clips."""

    @property
    def pending(self) -> int:
        return self.planned - self.written - self.quarantined - self.filtered

    def add_rejections(self, rejections: Iterable[Rejection]) -> None:
        self.add_counts(0, 0, count_left_out(rejections))

    def add_counts(self, written: int, size_bytes: int, left_out: LeftOut) -> None:
        self.written += written
        self.size_bytes += size_bytes
        for (status, reason), count in left_out.items():
            self.reasons[reason] += count
            if status == "quarantined":
                self.quarantined += count
            else:
                self.filtered += count

    def is_over(self, max_quarantined: float | None) -> bool:
        """Whether more clips are quarantined than allowed: a count, or below 1 a share of the plan."""
        if max_quarantined is None:
            return False
        allowed = max_quarantined * self.planned if 0 < max_quarantined < 1 else max_quarantined
        return self.quarantined > allowed

    def commonest_reasons(self) -> str:
        """What is left out and how often, most first."""
        return ", ".join(f"{reason} {count}" for reason, count in self.reasons.most_common()) or "none"

    def summary(self) -> str:
        """One line for a person."""
        line = (
            f"planned {self.planned} = written {self.written} + quarantined {self.quarantined} "
            f"+ filtered {self.filtered} + pending {self.pending}"
        )
        return f"{line}; {self.commonest_reasons()}" if self.reasons else line

    def as_dict(self) -> dict[str, object]:
        return {
            "planned": self.planned,
            "written": self.written,
            "quarantined": self.quarantined,
            "filtered": self.filtered,
            "pending": self.pending,
            "size_bytes": self.size_bytes,
            "reasons": dict(self.reasons.most_common()),
        }
