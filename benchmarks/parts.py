"""Rounds of updates, and where the time of an update goes: one clock and one table for all benchmarks of updates."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, Protocol

import torch

from weight_sync import SyncReport, WeightPublisher

from .screen import Advance, Screen


class Counts(Protocol):
    """Settings of a benchmark in rounds."""

    @property
    def warmup(self) -> int:
        """Rounds that do not count."""

    @property
    def repetitions(self) -> int:
        """Rounds that do."""


def rounds(
    settings: Counts, screen: Screen, title: str, series: dict[str, Any]
) -> Iterator[Advance]:
    """A turn for each round, to be ended with a few words about it; what the warm-up put into `series` is dropped."""
    total = settings.warmup + settings.repetitions
    with screen.progress(title, total) as advance:
        for i in range(total):
            if i == settings.warmup:
                series.clear()
            yield advance


def timed_update(publisher: WeightPublisher, tensors: dict[str, torch.Tensor]) -> dict[str, float]:
    """Seconds of an update as a whole ("publish"), and of its parts."""
    device = next(iter(tensors.values())).device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    report = publisher.publish(tensors)
    return {"publish": time.perf_counter() - start, **parts_of(report)}


def parts_of(report: SyncReport) -> dict[str, float]:
    """Seconds of each part, by name; parts overlap and contain each other (see docs/performance.md)."""
    return {
        "pack": report.pack_s,
        "check_staged": report.stage_s,
        "copy": report.copy_s,
        "verify": report.verify_s,
        "pause": report.pause_s,
        "begin_to_committed": report.begin_to_committed_s,
        "begin_to_verified": report.begin_to_verified_s,
    }
