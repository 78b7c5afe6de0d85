"""Engines that differ in where their ranks are, for tests of what they have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rollout import Engine, RolloutPool

KINDS = ("inline", "two ranks", "pool of two")


def engine_of_kind(kind: str, folder: Path, **options: Any) -> Engine:
    """One of `KINDS`, started; the caller ends it."""
    if kind == "pool of two":
        return RolloutPool(folder, num_replicas=2, **options)
    if kind == "two ranks":
        return Engine(folder, executor="local", tp_size=2, **options)
    return Engine(folder, **options)
