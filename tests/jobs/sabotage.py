"""A real engine that does something bad, once in a run."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from pipeline.engine import Engine, load_engine
from pipeline.types import EncodedClip, Frames


class SabotagedEngine:
    """Does it on its n-th forward pass, once for all actors of a run."""

    def __init__(self, engine: Engine, mark: Path, action: str, on_call: int) -> None:
        self._engine = engine
        self._mark = mark
        self._action = action
        self._calls_left = on_call

    def encode(self, clips: Sequence[Frames]) -> Any:
        self._count_down()
        return self._engine.encode(clips)

    def decode(self, latents: Sequence[torch.Tensor]) -> Any:
        self._count_down()
        return self._engine.decode(latents)

    def measure_psnr(self, frames: Frames, encoded: EncodedClip) -> float:
        return self._engine.measure_psnr(frames, encoded)

    def is_out_of_memory(self, error: BaseException) -> bool:
        return False

    def tighten(self) -> str | None:
        return None

    def _count_down(self) -> None:
        self._calls_left -= 1
        if self._calls_left == 0 and not self._mark.exists():
            self._mark.touch()
            if self._action in ("die", "hang"):
                os.kill(os.getpid(), signal.SIGKILL if self._action == "die" else signal.SIGSTOP)
            raise RuntimeError("sabotage")


class PoisonedEngine(SabotagedEngine):
    """Does it each time that it meets one clip, told by the bytes of its input."""

    def __init__(self, engine: Engine, action: str, is_poison: Callable[[Any], bool]) -> None:
        super().__init__(engine, Path(os.devnull), action, 0)
        self._is_poison = is_poison

    def encode(self, clips: Sequence[Frames]) -> Any:
        self._meet(clips)
        return self._engine.encode(clips)

    def decode(self, latents: Sequence[torch.Tensor]) -> Any:
        self._meet(latents)
        return self._engine.decode(latents)

    def _meet(self, payloads: Sequence[Any]) -> None:
        if not any(self._is_poison(payload) for payload in payloads):
            return
        if self._action == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        while True:
            time.sleep(1)


def load_poisoned(action: str, is_poison: Callable[[Any], bool], *arguments: Any) -> PoisonedEngine:
    return PoisonedEngine(load_engine(*arguments), action, is_poison)


def load_sabotaged(mark: Path, action: str, on_call: int, *arguments: Any) -> SabotagedEngine:
    return SabotagedEngine(load_engine(*arguments), mark, action, on_call)
