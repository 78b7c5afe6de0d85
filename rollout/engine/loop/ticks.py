"""The one order of things that all ranks of an engine follow.

Rank 0 decides what happens before each step: which commands have arrived, whose deadline has passed, when a weight
update is written. It puts that into a `Tick`, and every rank carries out the same ticks. All that they do in between is
a function of them, so the ranks schedule the same batches and sample the same tokens without asking each other.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from typing import Any, Protocol, TypeVar

from weight_sync.errors import DeadlineExceeded
from weight_sync.wire.rpc import Call

from ...protocol.tick_messages import Item, Ordered, Tick

T = TypeVar("T")

_KEPT_NAMES = 64
"""Boundaries that were given up and may still be armed by a rank that is behind."""


class NullCall:
    """A command on a rank to which nobody listens: rank 0 answers."""

    peer = "rank 0"
    deadline = float("inf")

    def __init__(self, body: Any) -> None:
        self.body = body

    def reply(self, body: Any) -> None:
        """Nobody hears it."""

    def stream(self, body: Any) -> None:
        """Nobody hears it."""

    def fail(self, error: BaseException) -> None:
        """Nobody hears it."""


class Action:
    """A function that another thread wants run between two steps."""

    def __init__(self, run: Callable[[], Any], deadline: float = math.inf) -> None:
        """`deadline`, `time.monotonic()`: it does not begin after it, also where whoever asked has no time to say "
        "so."""
        self._run = run
        self._deadline = deadline
        self._claimed = False
        self.future: Future[Any] = Future()

    def claim(self) -> bool:
        """From now on it will run for certain; False: whoever asked has given up, and it never will."""
        if not self._claimed and time.monotonic() >= self._deadline:
            self.future.cancel()
        if not self._claimed:
            self._claimed = self.future.set_running_or_notify_cancel()
        return self._claimed

    def __call__(self) -> None:
        """Run it, unless whoever asked has given up."""
        if not self.claim():
            return
        try:
            self.future.set_result(self._run())
        except BaseException as error:
            self.future.set_exception(error)

    def wait(self, timeout_s: float) -> Any:
        """Its result. `DeadlineExceeded` when it has not begun in time; then it never will."""
        try:
            return self.future.result(timeout_s)
        except CancelledError:
            raise _too_late("it did not come by the deadline, or rank 0 has given it up") from None
        except TimeoutError:
            if self.future.cancel():
                raise _too_late(f"it did not come within {timeout_s:.3g} s") from None
            return self.future.result()  # It has begun: a write is never abandoned half-way.


def _too_late(why: str) -> DeadlineExceeded:
    return DeadlineExceeded(
        f"no step boundary: {why}; a step takes longer, or the engine hangs; nothing was written; raise the deadline"
    )


class Boundaries:
    """Actions that wait for their place in the order, by name; every rank arms its own under the same name."""

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self._armed: dict[str, Action] = {}
        self._disarmed: deque[str] = deque(maxlen=_KEPT_NAMES)
        self._changed = threading.Condition()

    def arm(self, name: str, action: Action) -> None:
        """Make `action` known; it runs when the loop comes to `Boundary(name)`."""
        with self._changed:
            if name in self._disarmed:
                action.future.cancel()
                return
            self._armed[name] = action
            self._changed.notify_all()

    def claim(self, name: str) -> bool:
        """On rank 0, before other ranks hear of the boundary: whether its action is still wanted."""
        with self._changed:
            return self._armed[name].claim()

    def disarm(self, name: str) -> None:
        """Rank 0 has given the action of that name up; so does this rank, where it is armed already or not yet."""
        with self._changed:
            self._disarmed.append(name)
            action = self._armed.pop(name, None)
        if action is not None:
            action.future.cancel()

    def run(self, name: str) -> None:
        """Run the action of that name; a rank where it is not armed yet waits for it.

        Raises `DeadlineExceeded` where it never comes, or was given up by this rank alone: they have lost each other.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: name in self._armed, self._patience_s):
                raise DeadlineExceeded(
                    f"boundary {name!r} came, but this rank has nothing to do there"
                )
            action = self._armed.pop(name)
        if not action.claim():
            raise DeadlineExceeded(f"boundary {name!r} came when this rank had given it up alone")
        action()


class TickLink(Protocol):
    """Rank 0's way to the other ranks; ticks arrive in order."""

    def send(self, tick: Tick) -> None:
        """Rank 0: tell all other ranks; with no other rank, nothing."""

    def receive(self) -> Tick:
        """Another rank: wait for what rank 0 tells."""


def for_nobody(tick: Tick) -> list[tuple[Item, Call]]:
    """The items of a received tick, with calls that answer nobody."""
    return [
        (item, NullCall(item.body if isinstance(item, Ordered) else item)) for item in tick.items
    ]
