"""Which clip made its actors die: evidence from death to death. Pure.

At the first death over a shard nobody is accused: whatever was in hand becomes a suspect, and the shard gets care
(``messages.Caution``). Then each death names what was in hand and nothing else. So only the culprit is quarantined, and
a shard is charged only for a death that was certainly its own.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from pipeline.messages import Caution, Fault

STRIKES: dict[Fault, int] = {"crashed": 2, "hung": 2, "killed": 10}
"""Deaths with one clip alone in hand that prove its guilt. A kill from outside proves little."""
KILLS_BEFORE_CARE = 3


@dataclass(slots=True)
class Trouble:
    """A shard that did not go well so far."""

    charged: int = 0
    uncharged: int = 0
    kills: int = 0
    is_careful: bool = False
    suspects: set[str] = field(default_factory=set)
    strikes: Counter[tuple[str, Fault]] = field(default_factory=Counter)
    condemned: dict[str, Fault] = field(default_factory=dict)

    def caution(self) -> Caution:
        return Caution(is_careful=self.is_careful, suspects=frozenset(self.suspects), condemned=dict(self.condemned))

    def accuse(self, clips: tuple[str, ...] | None, fault: Fault, *, was_careful: bool) -> None:
        """An actor that had this shard died, with these clips of it in hand; None: that is not known."""
        if was_careful and clips == () and fault != "killed":
            self.charged += 1  # alone on its actor, and it was no clip: the shard itself
            return
        self.uncharged += 1
        self.kills += fault == "killed"
        if was_careful and clips and len(clips) == 1:
            self.strikes[clips[0], fault] += 1
            if self.strikes[clips[0], fault] >= STRIKES[fault]:
                self.condemned[clips[0]] = fault
        else:
            self.suspects.update(clips or ())
        self.is_careful |= fault != "killed" or self.kills >= KILLS_BEFORE_CARE
