"""Runs of broadcasts from rank 0, several under way at once."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence

import torch

from .communicator import Communicator, Posted
from .expected import ExpectedMessage, post


def send_parts(
    communicator: Communicator, parts: Sequence[torch.Tensor], *, depth: int, end: float
) -> None:
    """Rank 0: broadcast `parts` in order, at most `depth` at once. On return they may be written again."""
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


def receive_parts(
    communicator: Communicator,
    parts: Sequence[torch.Tensor],
    *,
    depth: int,
    end: float,
    telling: Sequence[int] | None = None,
) -> None:
    """Fill uint8 `parts`, which share no memory, with what rank 0 sends, in order.

    With `telling`, one number for each part, what is behind a part in its allocation is scratch, and over gloo lengths
    are proved, one part at a time (see `expected`).
    """
    guarded = telling is not None and communicator.kind == "gloo"
    if guarded:
        depth = 1  # what is behind a part is scratch until it has been checked
    window: deque[tuple[int, Posted, ExpectedMessage | None]] = deque()

    def complete_first() -> None:
        i, posted, message = window.popleft()
        posted.wait()
        if message is not None:
            message.check(f"group {communicator.name!r}, part {i}")

    try:
        for i, part in enumerate(parts):
            if len(window) >= depth:
                complete_first()
            message = None
            if guarded and telling is not None:
                message = post(
                    part, rank=communicator.rank, size=communicator.size, telling=telling[i]
                )
            posted = communicator.post_broadcast(
                part if message is None else message.posted,
                root=0,
                timeout_s=end - time.monotonic(),
            )
            window.append((i, posted, message))
        while window:
            complete_first()
    finally:
        window.clear()  # what is under way holds connections open
