"""What is a function of the parameters and kept beside them: made again after every change, and checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from weight_sync.errors import WeightUpdateError


@dataclass(frozen=True, slots=True, kw_only=True)
class DerivedState:
    """One row: a copy in another dtype or place, a scale, repacked or merged weights."""

    name: str
    """What it is called in errors."""
    sources: tuple[str, ...]
    """Checkpoint names of what it is made from."""
    refresh: Callable[[], None]
    """Make it from the parameters, in place: its address stays."""
    check: Callable[[], torch.Tensor]
    """Whether it is what it should be: bool, no dimensions, on the device."""


@torch.no_grad()
def refresh_all(rows: Sequence[DerivedState]) -> None:
    """Make all of them again, then check them, waiting for the device once.

    `WeightUpdateError` names those that are wrong: whoever wrote the parameters takes them back.
    """
    if not rows:
        return
    for row in rows:
        row.refresh()
    right = torch.stack([row.check() for row in rows]).tolist()
    wrong = [row for row, is_right in zip(rows, right, strict=True) if not is_right]
    if wrong:
        listed = "; ".join(f"{row.name}, made from {', '.join(row.sources)}" for row in wrong[:20])
        raise WeightUpdateError(
            f"derived state is not what its sources say: got {len(wrong)} wrong of {len(rows)} ({listed}), expected "
            "none; start a new engine"
        )
