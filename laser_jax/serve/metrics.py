"""What `/metrics` tells Prometheus."""

from typing import Any

import jax
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import generate_latest

_COMPILED = "/jax/core/compile/backend_compile_duration"
_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
_SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1)


class Metrics:
    """The counters of one server. Times are in seconds."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        known: dict[str, Any] = {"registry": self._registry}
        labels = ("route", "status")
        self.requests = Counter("laser_requests", "Answered requests.", labels, **known)
        text = "From a request's headers to its answer."
        timed: dict[str, Any] = known | {"buckets": _SECONDS}
        self.seconds = Histogram("laser_request_seconds", text, ("route",), **timed)
        self.rows = Counter("laser_rows", "Embedded texts.", **known)
        self.tokens = Counter("laser_tokens", "Tokens of embedded texts, without padding.", **known)
        self.queued = Gauge("laser_queued_rows", "Texts that wait for a batch.", **known)
        text = "Rows of a batch that are texts."
        self.fill = Histogram("laser_batch_fill", text, buckets=_SHARES, **known)
        text = "From the start of a batch until its vectors are here."
        self.batch_seconds = Histogram("laser_batch_seconds", text, **timed)
        text = "Programs that XLA compiled in this process."
        self.compilations = Counter("laser_compilations", text, **known)
        jax.monitoring.register_event_duration_secs_listener(self._compiled)

    def _compiled(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == _COMPILED:
            self.compilations.inc()

    def text(self) -> bytes:
        """All of them, in the format of Prometheus."""
        return generate_latest(self._registry)
