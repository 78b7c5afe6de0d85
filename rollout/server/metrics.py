"""`/metrics` for Prometheus: what the record has seen, and what the engine says when it is asked."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.responses import Response

from ..errors import RolloutError
from ..protocol.commands import SyncSeen
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
            "Time of a request over its tokens: the step as a client sees it",
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
        self._gauges = {
            name: Gauge(f"rollout_{name}", text, **at)
            for name, text in (
                ("requests_running", "Requests that hold KV blocks"),
                ("requests_waiting", "Requests in the queue"),
                ("samples_in_flight", "Samples that clients of this server wait for"),
                ("kv_usage", "Share of KV blocks in use"),
                ("weight_version_number", "Number of the version that serves"),
                ("paused", "1 while generation is paused"),
                ("torn", "1 while the weights are a mixture"),
                ("engine_decoded_tokens", "Tokens that the engine has drawn, for whomever"),
                ("engine_prompt_tokens", "Prompt tokens that the engine has computed"),
                ("up", "1 while the engine answers"),
            )
        }
        for result in ("committed", "refused"):
            self._updates.labels(result)
        self._seen_version = 0
        """Updates up to this number are counted, those that came by another way than this server included."""
        record.listeners.append(self)

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

    def _count(self, phases: dict[str, float]) -> None:
        self._updates.labels("committed").inc()
        for phase, seconds in phases.items():
            self._phases.labels(phase).observe(seconds)

    def _on_syncs(self, syncs: Sequence[SyncSeen]) -> None:
        """The engine's own last updates: those by a publisher at its address are counted when they are seen here."""
        for sync in reversed(syncs):
            if sync.version > self._seen_version:
                self._seen_version = sync.version
                self._count(
                    {
                        "stage": sync.stage_s,
                        "copy": sync.copy_s,
                        "verify": sync.verify_s,
                        "pause": sync.pause_s,
                        "total": sync.total_s,
                    }
                )

    def on_failed_sync(self) -> None:
        """An update call was refused, or failed."""
        self._updates.labels("refused").inc()

    async def text(self, ask: Ask) -> bytes:
        """The exposition; an engine that does not answer has `rollout_up` 0."""
        set_ = {name: gauge.set for name, gauge in self._gauges.items()}
        set_["samples_in_flight"](self._record.num_in_flight)
        try:
            status = await ask.state.engine.async_status()
        except (RolloutError, RuntimeError):
            set_["up"](0)
            return generate_latest(self.registry)
        used = status.num_blocks - status.num_free_blocks
        set_["up"](1)
        set_["requests_running"](status.num_running)
        set_["requests_waiting"](status.num_waiting)
        set_["kv_usage"](used / status.num_blocks if status.num_blocks else 0.0)
        set_["weight_version_number"](status.version)
        set_["engine_decoded_tokens"](status.num_decoded_tokens)
        set_["engine_prompt_tokens"](status.num_prompt_tokens)
        self._on_syncs(status.syncs)
        set_["paused"](status.paused is not None)
        set_["torn"](status.torn is not None)
        return generate_latest(self.registry)


async def metrics(ask: Ask) -> Response:
    """Counters, gauges and histograms in Prometheus' text format."""
    content = await ask.state.metrics.text(ask)
    return Response(content, media_type="text/plain; version=0.0.4; charset=utf-8")


ROUTES = (Route(path="/metrics", handler=metrics, methods=("GET",)),)
