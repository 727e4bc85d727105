"""Counts the bytes that tensors hold while a function runs: exact, and on the meta device free of charge."""

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """`peak`: the most bytes that tensors made in here held at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.where = ""
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and id(x.untyped_storage()) not in given:
                self._add(x.untyped_storage(), str(func))
        return result

    def _add(self, storage: Any, name: str) -> None:
        key = id(storage)
        if key in self._known:
            return
        size = storage.nbytes()
        self._known[key] = weakref.ref(storage, lambda _: self._drop(key, size))
        self.now += size
        if self.now > self.peak:
            self.peak, self.where = self.now, f"{name} {size}"

    def _drop(self, key: int, size: int) -> None:
        self.now -= size
        del self._known[key]
