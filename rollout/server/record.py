"""What has happened lately, for `/metrics` and whoever draws a picture of it: requests, and updates of the weights.

Written on the event loop by the routes; every reader gets copies.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import Any, Protocol

from weight_sync.report import SyncReport

KEPT = 2048
"""Entries of each kind; older ones are forgotten."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestEntry:
    """One sample that was handed out."""

    rid: str
    """The client's id of it."""
    began: float
    """Seconds since the epoch at which it reached the engine."""
    ended: float
    """And at which it was handed out."""
    prompt_tokens: int
    """Tokens of its prompt."""
    cached_tokens: int
    """Those of them that came from the prefix cache."""
    completion_tokens: int
    """Tokens that were drawn."""
    finish_reason: str
    """"stop", "length" or "abort"."""
    weight_versions: tuple[tuple[int, int, int], ...]
    """(number of the version, first token, one past the last token)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncEntry:
    """One update of the weights that came through this server."""

    at: float
    """Seconds since the epoch at which it was committed."""
    version: int
    """Number of the new version."""
    label: str | None
    """The trainer's name of it."""
    num_bytes: int
    """Bytes of tensors."""
    phases: dict[str, float]
    """Seconds of each phase: pack, stage, copy, verify, pause, total."""


class Listener(Protocol):
    """Somebody who wants to know at once, such as the metrics; called on the event loop, and quick."""

    def on_request(self, entry: RequestEntry) -> None: ...

    def on_sync(self, entry: SyncEntry) -> None: ...

    def on_failed_sync(self) -> None: ...


class Record:
    """The last requests and updates, and totals since the start."""

    def __init__(self) -> None:
        self.requests: deque[RequestEntry] = deque(maxlen=KEPT)
        self.syncs: deque[SyncEntry] = deque(maxlen=KEPT)
        self.listeners: list[Listener] = []
        self.num_in_flight = 0
        """Samples that clients wait for now."""
        self.num_finished = 0
        """Samples that were handed out whole, or with the reason of their abort."""
        self.num_output_tokens = 0
        """Tokens that were handed out."""
        self.num_prompt_tokens = 0
        """Tokens of the prompts of those samples."""

    def started(self, num_samples: int) -> None:
        """A call begins."""
        self.num_in_flight += num_samples

    def ended(self, num_samples: int) -> None:
        """A call is over, be it that its client went away."""
        self.num_in_flight -= num_samples

    def finished(self, result: dict[str, Any]) -> None:
        """A sample was handed out with this result."""
        meta = result["meta_info"]
        now = time.time()
        spans = tuple((s["number"], s["start"], s["end"]) for s in meta["weight_versions"])
        entry = RequestEntry(
            rid=meta["id"],
            began=now - meta["e2e_latency"],
            ended=now,
            prompt_tokens=meta["prompt_tokens"],
            cached_tokens=meta["cached_tokens"],
            completion_tokens=meta["completion_tokens"],
            finish_reason=(meta["finish_reason"] or {}).get("type", "abort"),
            weight_versions=spans,
        )
        self.requests.append(entry)
        self.num_finished += 1
        self.num_output_tokens += entry.completion_tokens
        self.num_prompt_tokens += entry.prompt_tokens
        for listener in self.listeners:
            listener.on_request(entry)

    def synced(self, report: SyncReport) -> None:
        """An update was committed."""
        entry = SyncEntry(
            at=time.time(),
            version=report.version,
            label=report.label,
            num_bytes=report.num_bytes,
            phases={
                "pack": report.pack_s,
                "stage": report.stage_s,
                "copy": report.copy_s,
                "verify": report.verify_s,
                "pause": report.pause_s,
                "total": report.begin_to_verified_s,
            },
        )
        self.syncs.append(entry)
        for listener in self.listeners:
            listener.on_sync(entry)

    def sync_failed(self) -> None:
        """An update was refused or failed."""
        for listener in self.listeners:
            listener.on_failed_sync()
