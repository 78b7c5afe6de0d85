"""Where commands of all threads meet, on rank 0; the loop takes all that has arrived at once.

No lock is held while a step is computed.
"""

from __future__ import annotations

import queue
from collections.abc import Callable
from typing import Any

from weight_sync.wire.rpc import Call

from ...protocol.tick_messages import Item, Ordered
from .ticks import NullCall


class Inbox:
    """A queue of tick items with the calls that wait for them."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[Item, Call]] = queue.SimpleQueue()

    def put(self, item: Item) -> None:
        """Something that no caller waits for."""
        self._queue.put((item, NullCall(item)))

    def put_call(self, call: Call) -> None:
        """A client's command."""
        self._queue.put((Ordered(body=call.body), call))

    def take(self, wait_s: float) -> list[tuple[Item, Call]]:
        """All that has arrived, in order; waits up to `wait_s` seconds for the first."""
        try:
            items = [self._queue.get(timeout=wait_s) if wait_s > 0 else self._queue.get_nowait()]
        except queue.Empty:
            return []
        while True:
            try:
                items.append(self._queue.get_nowait())
            except queue.Empty:
                return items

    def drain(self, refuse: Callable[[Any], None]) -> None:
        """Hand every call that is left to `refuse`; for the end."""
        for _, call in self.take(0.0):
            refuse(call)
