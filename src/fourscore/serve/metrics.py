"""What /metrics tells Prometheus: waiting as a reader feels it, the queue, the cache, tokens of the base and of each adapter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

if TYPE_CHECKING:
    from fourscore.engine import Engine

FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
BETWEEN = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0)


class Metrics:
    """The counters of one server. Labels are names of served models, paths of this server and codes: never what a client wrote."""

    def __init__(self, engine: Engine) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter("fourscore_requests", "Requests answered", ["path", "status"], registry=self._registry)
        self.first_token = Histogram(
            "fourscore_time_to_first_token_seconds",
            "From taking a request to its first token",
            ["model"],
            buckets=FIRST,
            registry=self._registry,
        )
        self.between = Histogram(
            "fourscore_time_between_tokens_seconds",
            "From one token of an answer to the next",
            ["model"],
            buckets=BETWEEN,
            registry=self._registry,
        )
        self.queued = Histogram(
            "fourscore_queue_seconds", "From taking a request to its first computation", ["model"], buckets=FIRST, registry=self._registry
        )
        self.tokens = Counter(
            "fourscore_tokens", "Tokens of prompts, of them found in the cache, and of answers", ["model", "kind"], registry=self._registry
        )
        self.finished = Counter("fourscore_answers", "Answers by how they ended", ["model", "finish"], registry=self._registry)
        self._registry.register(_EngineGauges(engine))

    def text(self) -> bytes:
        """The exposition."""
        return generate_latest(self._registry)


class _EngineGauges:
    """The engine's own figures, asked for when Prometheus asks."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        stats: Any = self._engine.stats()
        yield GaugeMetricFamily("fourscore_running", "Answers under way", stats.running)
        yield GaugeMetricFamily("fourscore_waiting", "Answers that wait for room", stats.waiting)
        yield GaugeMetricFamily("fourscore_cache_used_tokens", "Tokens that the key-value cache holds", stats.cache_used)
        yield GaugeMetricFamily("fourscore_cache_limit_tokens", "Tokens that it may hold", stats.cache_limit)
        yield GaugeMetricFamily("fourscore_preempted", "Answers that lost their cache to others and were computed again", stats.preempted)
