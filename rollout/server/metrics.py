"""`/metrics` for Prometheus: what the record has seen, and what the engine says when it is asked."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.utils import floatToGoString
from starlette.responses import Response

from ..errors import RolloutError
from ..protocol.commands import STEP_EDGES_S, Status, SyncSeen
from .record import Record, RequestEntry, SyncEntry
from .routing import Ask, Route

_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


class Metrics:
    """The instruments of one server, in a registry of their own."""

    def __init__(self, record: Record) -> None:
        self.registry = CollectorRegistry()
        at = {"registry": self.registry}
        self._record = record
        self._requests = Counter(
            "rollout_requests", "Samples handed out, by how they ended", ["finish_reason"], **at
        )
        self._prompt_tokens = Counter("rollout_prompt_tokens", "Tokens of prompts", **at)
        self._cached_tokens = Counter("rollout_cached_tokens", "Those from the prefix cache", **at)
        self._tokens = Counter("rollout_generation_tokens", "Tokens drawn", **at)
        self._latency = Histogram(
            "rollout_request_seconds", "From arrival to the last token", buckets=_SECONDS, **at
        )
        self._token_time = Histogram(
            "rollout_token_seconds",
            "Time of a request over its tokens, waiting included",
            buckets=_SECONDS,
            **at,
        )
        self._updates = Counter(
            "rollout_weight_updates", "Updates, by how they ended", ["result"], **at
        )
        self._update_bytes = Counter(
            "rollout_weight_update_bytes", "Bytes of committed updates", **at
        )
        self._phases = Histogram(
            "rollout_weight_update_seconds",
            "Seconds of each phase of an update",
            ["phase"],
            buckets=_SECONDS,
            **at,
        )
        for result in ("committed", "refused"):
            self._updates.labels(result)
        self._seen_version = 0
        """Updates up to this number are counted, those that came by another way than this server included."""
        self._status: Status | None = None
        self.registry.register(self)
        record.listeners.append(self)

    # ---- record.Listener ---------------------------------------------------------------------------------------------

    def on_request(self, entry: RequestEntry) -> None:
        """A sample was handed out."""
        self._requests.labels(entry.finish_reason).inc()
        self._prompt_tokens.inc(entry.prompt_tokens)
        self._cached_tokens.inc(entry.cached_tokens)
        self._tokens.inc(entry.completion_tokens)
        seconds = entry.ended - entry.began
        self._latency.observe(seconds)
        if entry.completion_tokens:
            self._token_time.observe(seconds / entry.completion_tokens)

    def on_sync(self, entry: SyncEntry) -> None:
        """An update was committed."""
        self._update_bytes.inc(entry.num_bytes)
        if entry.version > self._seen_version:
            self._seen_version = entry.version
            self._count(entry.phases)

    def on_failed_sync(self) -> None:
        """An update call was refused, or failed."""
        self._updates.labels("refused").inc()

    def _count(self, phases: dict[str, float]) -> None:
        self._updates.labels("committed").inc()
        for phase, seconds in phases.items():
            self._phases.labels(phase).observe(seconds)

    # ---- what the engine says ----------------------------------------------------------------------------------------

    def collect(self) -> Iterable[Metric]:
        """Called by the registry: the families that come from the engine's last status."""
        return _families(self._status, self._record)

    def _on_syncs(self, status: Status) -> None:
        """The engine's own last updates: those by a publisher at its address are counted when they are seen here."""
        if status.version < self._seen_version:  # Another engine answers at this address.
            self._seen_version = 0
        for sync in reversed(status.syncs):
            if sync.version > self._seen_version:
                self._seen_version = sync.version
                self._count(_phases(sync))

    async def text(self, ask: Ask) -> bytes:
        """The exposition; an engine that does not answer has `rollout_up` 0."""
        try:
            self._status = await ask.state.engine.async_status()
        except (RolloutError, RuntimeError):
            self._status = None
        else:
            self._on_syncs(self._status)
        return generate_latest(self.registry)


def _phases(sync: SyncSeen) -> dict[str, float]:
    names = ("stage", "copy", "verify", "pause", "total")
    return {name: getattr(sync, f"{name}_s") for name in names}


def _families(status: Status | None, record: Record) -> Iterable[Metric]:
    """Of an engine; None: it does not answer, and nothing of it is shown that may be old."""
    values = {
        "up": ("1 while the engine answers", float(status is not None)),
        "samples_in_flight": ("Samples that clients of this server wait for", record.num_in_flight),
    }
    if status is not None:
        used = status.num_blocks - status.num_free_blocks
        values |= {
            "requests_running": ("Requests that hold KV blocks", status.num_running),
            "requests_waiting": ("Requests in the queue", status.num_waiting),
            "kv_usage": ("Share of KV blocks in use", used / max(1, status.num_blocks)),
            "weight_version_number": ("Number of the version that serves", status.version),
            "paused": ("1 while generation is paused", status.paused is not None),
            "torn": ("1 while the weights are a mixture", status.torn is not None),
        }
    for name, (text, value) in values.items():
        yield GaugeMetricFamily(f"rollout_{name}", text, value=float(value))
    if status is None:
        return
    for name, text, count in (
        ("decoded", "Tokens that the engine has drawn, for whomever", status.num_decoded_tokens),
        ("prompt", "Prompt tokens that the engine has computed", status.num_prompt_tokens),
    ):
        yield CounterMetricFamily(f"rollout_engine_{name}_tokens", text, value=count)
    yield _steps(status.step_counts, status.step_s)


def _steps(counts: Sequence[int], seconds: float) -> Metric:
    edges = [*(floatToGoString(edge) for edge in STEP_EDGES_S), "+Inf"]
    return HistogramMetricFamily(
        "rollout_step_seconds",
        "Steps of the engine by how long they took",
        buckets=list(zip(edges, itertools.accumulate(counts), strict=True)),
        sum_value=seconds,
    )


async def metrics(ask: Ask) -> Response:
    """Counters, gauges and histograms in Prometheus' text format."""
    content = await ask.state.metrics.text(ask)
    return Response(content, media_type="text/plain; version=0.0.4; charset=utf-8")


ROUTES = (Route(path="/metrics", handler=metrics, methods=("GET",)),)
