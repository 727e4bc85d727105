from __future__ import annotations

import socket

from prometheus_client.parser import text_string_to_metric_families

from pipeline.service.metrics import ServiceMetrics, merge_texts


def test_the_metrics_of_several_replicas_are_one_text_with_each_family_once() -> None:
    texts = []
    for number, replica in enumerate(("a", "b"), 1):
        metrics = ServiceMetrics(replica)
        metrics.watch("latents_queue", "Waiting.", lambda number=number: number)  # type: ignore[misc]
        metrics.watch("latents_cache_bytes", "Kept.", lambda: 7, of_machine=True)
        for _ in range(number):
            metrics.count_request("/v1/decode", 200, 0.3)
            metrics.count_batch(2, 98, 1.5)
        texts.append(metrics.to_text())
    merged = merge_texts(texts)
    names = [line.split()[2] for line in merged.splitlines() if line.startswith("# TYPE")]
    assert len(names) == len(set(names))
    (shared,) = [line for line in merged.splitlines() if line.startswith("latents_cache_bytes")]
    assert shared == f'latents_cache_bytes{{machine="{socket.gethostname()}"}} 7.0'
    samples = {
        (sample.name, sample.labels["replica"]): sample.value
        for family in text_string_to_metric_families(merged)
        for sample in family.samples
        if sample.name in ("latents_requests_total", "latents_queue", "latents_decoded_frames_total")
    }
    assert samples == {
        ("latents_requests_total", "a"): 1,
        ("latents_requests_total", "b"): 2,
        ("latents_decoded_frames_total", "a"): 98,
        ("latents_decoded_frames_total", "b"): 196,
        ("latents_queue", "a"): 1,
        ("latents_queue", "b"): 2,
    }
