"""Metrics for Prometheus at /metrics. Each server has a registry of its own, so that several can live in a process."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)

from deploy.serve.statistics import ModelStatistics

STAGES = ("receive", "decode", "queue", "inference", "draw", "total")
"""Stages of a request: its body arrives; decoding, waiting for a decoder included; waiting for the runtime; the call of
the runtime that it rode in; drawing, with `annotate`; from its head to its answer."""
_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_IMAGES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._models: dict[str, tuple[str, str, str]] = {}
        self.statistics: defaultdict[str, ModelStatistics] = defaultdict(ModelStatistics)
        """Of each model, for the protocol's statistics extension."""
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        GCCollector(registry=registry)
        self.requests = Counter(
            "compress_requests", "Requests by route and status", ["route", "method", "status"], registry=registry
        )
        self.in_progress = Gauge("compress_requests_in_progress", "Requests that wait for an answer", registry=registry)
        self.stages = Histogram(
            "compress_stage_seconds",
            "Latency of the stages of answered detection requests",
            ["model", "stage"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.images = Counter("compress_images", "Images that were answered", ["model"], registry=registry)
        self.batches = Histogram(
            "compress_batch_size", "Images in a call of the runtime", ["model"], buckets=_IMAGES, registry=registry
        )
        self.calls = Histogram(
            "compress_call_seconds", "A call of the runtime", ["model"], buckets=_SECONDS, registry=registry
        )
        self.rejected = Counter(
            "compress_rejected", "Requests answered 429, by reason", ["model", "reason"], registry=registry
        )
        self.failures = Counter(
            "compress_inference_failures", "Calls of the runtime that failed", ["model"], registry=registry
        )
        self.gone = Counter("compress_clients_gone", "Clients that left before their answer", registry=registry)
        self.reloads = Counter(
            "compress_reloads", "Loads of a model's file again", ["model", "result"], registry=registry
        )
        self._info = Gauge(
            "compress_model_info", "1 for each loaded model", ["model", "backend", "card"], registry=registry
        )
        self._depth = Gauge(
            "compress_queue_depth", "Images inside: decoding, waiting, running", ["model"], registry=registry
        )
        self._held = Gauge("compress_held_bytes", "Request bodies in memory", registry=registry)

    def watch_model(self, name: str, backend: str, card: str, depth: Callable[[], float]) -> None:
        if name in self._models:  # loaded again, perhaps with another card
            self._info.remove(*self._models[name])
        self._models[name] = (name, backend, card)
        self._info.labels(name, backend, card).set(1)
        self._depth.labels(name).set_function(depth)
        for stage in STAGES:
            self.stages.labels(name, stage)  # present before the first request
        self.batches.labels(name)
        self.failures.labels(name)

    def watch_bodies(self, held: Callable[[], float]) -> None:
        self._held.set_function(held)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)
