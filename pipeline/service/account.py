"""What one replica's requests hold in memory: bodies, latents, and answers that clients have not taken yet.

Ray Serve takes an answer from the replica as fast as it is given and holds it until the client has read it, so a video
counts until then, however slow its client is.
"""

from __future__ import annotations

import threading

from pipeline.service.errors import RequestError


class Held:
    """A share of the account. Given back once, however often ``release`` is called. Of one request, so not thread-safe."""

    def __init__(self, account: MemoryAccount) -> None:
        self._account = account
        self._size_bytes = 0

    def __enter__(self) -> Held:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def grow(self, size_bytes: int) -> None:
        """Hold so much more. Raises: RequestError: as ``MemoryAccount.take``."""
        self._account.add(size_bytes, self._size_bytes)
        self._size_bytes += size_bytes

    def shrink(self, size_bytes: int) -> None:
        """Hold no more than so much from now on."""
        given_back = max(0, self._size_bytes - size_bytes)
        self._size_bytes -= given_back
        self._account.give_back(given_back)

    def hand_over(self) -> Held:
        """This share in other hands: the end of a ``with`` block does not release it any more."""
        taken = Held(self._account)
        taken._size_bytes, self._size_bytes = self._size_bytes, 0
        return taken

    def release(self) -> None:
        self.shrink(0)


class MemoryAccount:
    """A byte budget. Thread-safe."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._held_bytes = 0
        self._lock = threading.Lock()

    @property
    def held_bytes(self) -> int:
        return self._held_bytes

    def take(self, size_bytes: int) -> Held:
        """Raises: RequestError: 429: others hold too much. 413: more than the whole budget."""
        held = Held(self)
        held.grow(size_bytes)
        return held

    def add(self, size_bytes: int, already: int) -> None:
        """Count so much for a share that has ``already`` so much."""
        if already + size_bytes > self._limit_bytes:
            raise RequestError(
                413,
                "too_large",
                f"the request needs {already + size_bytes} bytes of memory, service.memory_bytes is {self._limit_bytes}",
            )
        with self._lock:
            if self._held_bytes + size_bytes > self._limit_bytes:
                raise RequestError(
                    429,
                    "memory_full",
                    f"requests hold {self._held_bytes} bytes, this one needs {size_bytes} more and service.memory_bytes is "
                    f"{self._limit_bytes}; try again when others have taken their answers",
                    retry_after_s=2,
                )
            self._held_bytes += size_bytes

    def give_back(self, size_bytes: int) -> None:
        with self._lock:
            self._held_bytes -= size_bytes
