"""What Prometheus is told. Each replica counts for itself under its own ``replica`` label.

What the replicas of a machine share has a ``machine`` label instead, and stands once in the merged text.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each counter

_SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_BATCHES = (1, 2, 4, 8, 16, 32)


class ServiceMetrics:
    """The counters of one replica."""

    def __init__(self, replica: str) -> None:
        self._registry = CollectorRegistry()
        self._replica = replica
        into: dict[str, Any] = {"registry": self._registry}
        self._requests = Counter("latents_requests", "Answers by route and status.", ("replica", "route", "status"), **into)
        self._seconds = Histogram(
            "latents_request_seconds", "From request to end of answer.", ("replica", "route"), buckets=_SECONDS, **into
        )
        self._refused = Counter("latents_refused", "Requests refused, by reason.", ("replica", "reason"), **into)
        self._cache = Counter("latents_cache", "Videos asked for: hit, joined or miss.", ("replica", "outcome"), **into)
        self._frames = Counter("latents_decoded_frames", "Frames decoded and coded.", ("replica",), **into)
        self._batch = Histogram("latents_batch_size", "Latents decoded together.", ("replica",), buckets=_BATCHES, **into)
        self._busy = Counter("latents_decode_seconds", "Time that the model worked.", ("replica",), **into)

    def count_request(self, route: str, status: int, seconds: float) -> None:
        self._requests.labels(self._replica, route, str(status)).inc()
        self._seconds.labels(self._replica, route).observe(seconds)

    def count_refused(self, reason: str) -> None:
        self._refused.labels(self._replica, reason).inc()

    def count_cache(self, outcome: str) -> None:
        self._cache.labels(self._replica, outcome).inc()

    def count_batch(self, clips: int, frames: int, seconds: float) -> None:
        self._batch.labels(self._replica).observe(clips)
        self._frames.labels(self._replica).inc(frames)
        self._busy.labels(self._replica).inc(seconds)

    def watch(self, name: str, help_text: str, read: Callable[[], float], *, of_machine: bool = False) -> None:
        """Show a value that is read when it is asked for; ``of_machine``: its replicas share it."""
        label, value = ("machine", socket.gethostname()) if of_machine else ("replica", self._replica)
        Gauge(name, help_text, (label,), registry=self._registry).labels(value).set_function(read)

    def to_text(self) -> str:
        return generate_latest(self._registry).decode()


def merge_texts(texts: Iterable[str]) -> str:
    """The metrics of several replicas as one text, each family once."""
    families: dict[str, Metric] = {}
    for text in texts:
        for family in text_string_to_metric_families(text):
            known = families.setdefault(family.name, family)
            if known is not family:
                there = [sample.labels for sample in known.samples if "machine" in sample.labels]
                known.samples.extend(sample for sample in family.samples if sample.labels not in there)
    return generate_latest(_Merged(families.values())).decode()


class _Merged(CollectorRegistry):
    """A registry of families that are counted already."""

    def __init__(self, families: Iterable[Metric]) -> None:
        super().__init__()
        self._families = list(families)

    def collect(self) -> Iterator[Metric]:
        return iter(self._families)
