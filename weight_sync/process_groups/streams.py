"""Runs of broadcasts from rank 0, several under way at once."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence

import torch

from ..errors import TransportError
from .communicator import Communicator, Posted
from .expected import ExpectedMessage


def send_parts(
    communicator: Communicator, parts: Sequence[torch.Tensor], *, depth: int, end: float
) -> None:
    """Rank 0: broadcast `parts` in order, at most `depth` at once. On return they may be written again."""
    _broadcast(communicator, parts, depth, end)


def receive_parts(
    communicator: Communicator, parts: Sequence[torch.Tensor], *, depth: int, end: float
) -> None:
    """Fill uint8 `parts`, which share no memory, with what rank 0 sends, in order."""
    _broadcast(communicator, parts, depth, end)


def _broadcast(
    communicator: Communicator, parts: Sequence[torch.Tensor], depth: int, end: float
) -> None:
    """Rank 0 sends and the others receive, at most `depth` parts at once."""
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


def receive_expected(
    communicator: Communicator,
    parts: Sequence[torch.Tensor],
    *,
    end: float,
    telling: Sequence[int],
) -> None:
    """`receive_parts` over gloo, one at a time, each with a proof of its length; see `expected`.

    `telling`: one number for each part. What is behind a part is scratch until the next one comes.
    """
    for i, (part, tells) in enumerate(zip(parts, telling, strict=True)):
        message = ExpectedMessage(part, telling=tells)
        left_s = end - time.monotonic()
        try:
            communicator.post_broadcast(message.posted, root=0, timeout_s=left_s).wait()
        except TransportError as error:
            raise TransportError(
                f"{error} (a member ends, too, when it gets more bytes than announced)"
            ) from error
        message.check(f"group {communicator.name!r}, part {i}")
