"""Figures of the server in Prometheus' format, with the names and meanings of vLLM's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from vila_deploy.runtime.request import Event, Finished

if TYPE_CHECKING:
    from vila_deploy.runtime.scheduler import SchedulerStats

PREFIX = "vila:"
MEDIA_TYPE = CONTENT_TYPE_LATEST
# What vLLM calls the ends of answers.
REASONS = {
    "stop": "stop",
    "length": "length",
    "context": "length",
    "cancelled": "abort",
    "timeout": "timeout",
    "error": "error",
}
_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300, 600)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000)
_TIMES = {
    "time_to_first_token_seconds": "From the queueing of a request to its first token.",
    "inter_token_latency_seconds": "From one token of an answer to the next.",
    "e2e_request_latency_seconds": "From the queueing of a request to the end of its answer.",
    "request_queue_time_seconds": "In the queue, before a slot was free.",
    "request_prefill_time_seconds": "In a slot, before the first token; images included.",
    "request_decode_time_seconds": "From the first token to the last.",
}
_LENGTHS = {
    "request_prompt_tokens": "Tokens of a prompt, images included.",
    "request_generation_tokens": "Tokens of an answer.",
}
_GAUGES = {
    "num_requests_running": ("Requests in a slot.", lambda s: s.running),
    "num_requests_waiting": ("Requests in the queue.", lambda s: s.waiting),
    "kv_cache_usage_perc": ("Share of the key/value cache that is held.", lambda s: s.cache_usage),
    "mm_cache_bytes": ("Image features that are held.", lambda s: s.image_cache_bytes),
}
_COUNTERS = {
    "prefix_cache_queries": ("Tokens of prompts.", lambda s: s.prefix_queries),
    "prefix_cache_hits": ("Tokens of prompts that were cached.", lambda s: s.prefix_hits),
    "mm_cache_queries": ("Images needed.", lambda s: s.image_queries),
    "mm_cache_hits": ("Images whose features were held.", lambda s: s.image_hits),
    "prompt_tokens": (
        "Tokens of prompts, cached or prefilled.",
        lambda s: s.prompt_tokens,
    ),
    "generation_tokens": ("Tokens of answers.", lambda s: s.generation_tokens),
    "decode_steps": ("Steps that decoded, for all slots at once.", lambda s: s.decode_steps),
}


class ServerMetrics:
    """Counts HTTP responses and the events of requests; asks the scheduler for the rest.

    Args:
        model_name: the label model_name of each figure.
        stats: the scheduler's; None: requests are answered elsewhere, and counted there.
    """

    def __init__(self, model_name: str, stats: Callable[[], SchedulerStats] | None):
        self._registry = CollectorRegistry()
        if stats is not None:
            self._registry.register(_SchedulerCollector(model_name, stats))
        label: dict[str, Any] = {"labelnames": ["model_name"], "registry": self._registry}
        self._histograms = {
            name: Histogram(PREFIX + name, text, buckets=buckets, **label).labels(model_name)
            for texts, buckets in ((_TIMES, _SECONDS), (_LENGTHS, _TOKENS))
            for name, text in texts.items()
        }
        self._responses = Counter(
            f"{PREFIX}http_responses",
            "HTTP responses.",
            labelnames=["path", "status"],
            registry=self._registry,
        )

    def count_response(self, path: str, status: int) -> None:
        """Count an HTTP response; `path` is one of a few, lest names be made up outside."""
        self._responses.labels(path, str(status)).inc()

    def observe(self, event: Event) -> None:
        """Take the times and lengths of a request that has ended; from any thread."""
        if isinstance(event, Finished):
            for name, value in _observations(event):
                self._histograms[name].observe(value)

    def exposition(self) -> bytes:
        """Return all figures as text."""
        return generate_latest(self._registry)


def _observations(event: Finished) -> Iterator[tuple[str, float]]:
    seconds = {name: value / 1e3 for name, value in event.timings_ms.items()}
    yield "e2e_request_latency_seconds", sum(seconds.values())
    yield "request_queue_time_seconds", seconds["queue"]
    yield "request_prompt_tokens", event.prompt_tokens
    yield "request_generation_tokens", event.completion_tokens
    if event.tokens:
        yield "time_to_first_token_seconds", event.first_token_ms / 1e3
        yield "request_prefill_time_seconds", seconds["vision"] + seconds["prefill"]
        yield "request_decode_time_seconds", seconds["decode"]
    for gap_ms in event.inter_token_ms:
        yield "inter_token_latency_seconds", gap_ms / 1e3


class _SchedulerCollector(Collector):
    """The scheduler's own counts, read at each scrape."""

    def __init__(self, model_name: str, stats: Callable[[], SchedulerStats]):
        self._model_name, self._stats = model_name, stats

    def collect(self) -> Iterator[Metric]:
        stats, names = self._stats(), ["model_name"]
        for name, (text, value) in _GAUGES.items():
            gauge = GaugeMetricFamily(PREFIX + name, text, labels=names)
            gauge.add_metric([self._model_name], value(stats))
            yield gauge
        for name, (text, value) in _COUNTERS.items():
            counter = CounterMetricFamily(PREFIX + name, text, labels=names)
            counter.add_metric([self._model_name], value(stats))
            yield counter
        ended = dict.fromkeys(REASONS.values(), 0)
        for reason, count in stats.ended.items():
            ended[REASONS[reason]] += count
        success = CounterMetricFamily(
            f"{PREFIX}request_success", "Requests that ended.", labels=[*names, "finished_reason"]
        )
        for reason, count in ended.items():
            success.add_metric([self._model_name, reason], count)
        yield success
