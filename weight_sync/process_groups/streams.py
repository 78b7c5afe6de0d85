"""Runs of broadcasts from rank 0, several under way at once."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence

import torch

from .communicator import Communicator, Posted


def broadcast_parts(
    communicator: Communicator, parts: Sequence[torch.Tensor], *, depth: int, end: float
) -> None:
    """Rank 0 sends `parts`, uint8, in order, at most `depth` at once; the others receive into theirs.

    Those of a receiver share no memory. On return they may be used again.
    """
    window: deque[Posted] = deque()
    try:
        for part in parts:
            if len(window) >= depth:
                window.popleft().wait()
            left_s = end - time.monotonic()
            window.append(communicator.post_broadcast(part, root=0, timeout_s=left_s))
        while window:
            window.popleft().wait()
    finally:
        window.clear()  # what is under way holds connections open
