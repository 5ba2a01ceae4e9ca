"""What Prometheus is told: how long phases take, how many jobs wait, and what became of requests."""

from __future__ import annotations

import time
from collections.abc import Callable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """The metrics of one server."""

    def __init__(self, waiting: Callable[[], int], running: Callable[[], int], listeners: Callable[[], int]) -> None:
        """Count nothing yet; the arguments are asked whenever the metrics are read."""
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self.phase = Histogram(
            "fluxonnx_phase_seconds", "Time of a phase of a run", ["phase"], buckets=SECONDS, registry=self.registry
        )
        self.picture = Histogram(
            "fluxonnx_picture_seconds",
            "Time from the start of a batch to each of its pictures",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.wait = Histogram(
            "fluxonnx_queue_seconds", "Time that jobs waited", buckets=SECONDS, registry=self.registry
        )
        self.batch = Histogram(
            "fluxonnx_batch_pictures", "Pictures in a batch", buckets=(1, 2, 4, 8, 16), registry=self.registry
        )
        self.jobs = Counter("fluxonnx_jobs", "Jobs that ended", ["state"], registry=self.registry)
        self.pictures = Counter("fluxonnx_pictures", "Pictures that were made", registry=self.registry)
        self.requests = Counter(
            "fluxonnx_http_requests", "Requests", ["method", "route", "status"], registry=self.registry
        )
        self.request = Histogram(
            "fluxonnx_http_seconds", "Time of requests", ["route"], buckets=SECONDS, registry=self.registry
        )
        for name, text, read in (
            ("fluxonnx_jobs_queued", "Jobs that wait", waiting),
            ("fluxonnx_jobs_running", "Jobs that are drawn", running),
            ("fluxonnx_listeners", "Clients that listen to events", listeners),
        ):
            Gauge(name, text, registry=self.registry).set_function(read)

    def text(self) -> bytes:
        """Return everything in the format of Prometheus."""
        return generate_latest(self.registry)


class PhaseClock:
    """Observes how long each phase lasts; an inner phase does not count for the outer one."""

    def __init__(self, histogram: Histogram) -> None:
        """No phase is under way."""
        self._histogram, self._name, self._since = histogram, "", 0.0

    def began(self, name: str) -> None:
        """A phase began, or goes on; "" if none is under way any more."""
        now = time.perf_counter()
        if self._name:
            self._histogram.labels(self._name).observe(now - self._since)
        self._name, self._since = name, now
