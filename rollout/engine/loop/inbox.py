"""Where commands of all threads meet, on rank 0; the loop takes all that has arrived at once.

Rank 0 looks at the deadlines of what it takes, once and for all ranks. So what may take long is the last of what is
taken: what came behind it is looked at when that is done.

No lock is held while a step is computed.
"""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from weight_sync.errors import DeadlineExceeded
from weight_sync.wire.rpc import Call

from ...protocol import commands as cmd
from ...protocol.tick_messages import Boundary, Item, Ordered
from .ticks import NullCall

LONG = (
    *(cmd.GetWeights, cmd.SaveShardedModel, cmd.ResetWeights),
    *(cmd.ReleaseMemory, cmd.ResumeMemory),
)
"""Commands that may take longer than others wait; so may a boundary, where an update is written."""


class Inbox:
    """A queue of tick items with the calls that wait for them."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[Item, Call] | None] = queue.SimpleQueue()
        self._ending: Exception | None = None
        self._behind: deque[tuple[Item, Call]] = deque()
        """What had arrived behind something that may take long; the taker's."""

    def put(self, item: Item) -> None:
        """Something that no caller waits for."""
        self._queue.put((item, NullCall(item)))

    def put_call(self, call: Call) -> None:
        """A client's command."""
        self._queue.put((Ordered(body=call.body), call))

    def end(self, error: Exception) -> None:
        """Any thread: the next `take` raises `error`, and so do all later ones."""
        self._ending = error
        self._queue.put(None)

    def take(self, wait_s: float) -> list[tuple[Item, Call]]:
        """What has arrived, in order, up to what may take long; waits up to `wait_s` seconds for the first."""
        self._behind.extend(self._taken(0.0 if self._behind else wait_s))
        if self._ending is not None:
            raise self._ending
        items: list[tuple[Item, Call]] = []
        while self._behind and not (items and _may_take_long(items[-1][0])):
            items.append(self._behind.popleft())
        return items

    def drain(self, refuse: Callable[[Any], None]) -> None:
        """Hand every call that is left to `refuse`; for the end."""
        for _, call in (*self._behind, *self._taken(0.0)):
            refuse(call)
        self._behind.clear()

    def _taken(self, wait_s: float) -> list[tuple[Item, Call]]:
        items = []
        try:
            items.append(
                self._queue.get(timeout=wait_s) if wait_s > 0 else self._queue.get_nowait()
            )
            while True:
                items.append(self._queue.get_nowait())
        except queue.Empty:
            return [item for item in items if item is not None]


def _may_take_long(item: Item) -> bool:
    return isinstance(item, Boundary) or (isinstance(item, Ordered) and isinstance(item.body, LONG))


def in_time(call: Call) -> bool:
    """Whether somebody still waits for it; else it is refused, and no rank carries it out."""
    if time.monotonic() < call.deadline:
        return True
    call.fail(
        DeadlineExceeded(
            f"{type(call.body).__name__}: its deadline passed before the loop came to it, and it was not carried out; "
            "raise timeout_s, or look at what keeps the engine"
        )
    )
    return False
