"""The one order of things that all ranks of an engine follow.

Rank 0 decides what happens before each step: which commands have arrived, whose deadline has passed, when a weight
update is written. It puts that into a `Tick`, and every rank carries out the same ticks. All that they do in between is
a function of them, so the ranks schedule the same batches and sample the same tokens without asking each other.
"""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from typing import Any, Protocol, TypeVar

from weight_sync.errors import DeadlineExceeded
from weight_sync.wire.rpc import Call

from ...protocol.tick_messages import Item, Ordered, Tick

T = TypeVar("T")

_KEPT_NAMES = 64
"""Names of boundaries that were given up and may still be armed by a rank that is behind."""


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
        self._claimed: bool | None = None  # None: nobody has asked yet.
        self.future: Future[Any] = Future()

    @property
    def decided(self) -> bool:
        """Whether it will run for certain, or never."""
        return self._claimed is not None

    def claim(self) -> bool:
        """From now on it will run for certain; False: whoever asked has given up, and it never will."""
        if self._claimed is None and time.monotonic() >= self._deadline:
            self.future.cancel()
        if self._claimed is None:
            self._claimed = self.future.set_running_or_notify_cancel()
        return self._claimed

    def give_up(self, error: Exception | None = None) -> None:
        """Unless it has begun, it never will: whoever asked gets `error`, or `DeadlineExceeded`."""
        if error is None:
            self.future.cancel()
        elif self.claim() and not self.future.done():
            self.future.set_exception(error)

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
            raise _too_late("it did not come by the deadline, or was given up before") from None
        except TimeoutError as error:
            if isinstance(error, DeadlineExceeded):  # The action's own.
                raise
            if self.future.cancel():
                raise _too_late(f"it did not come within {timeout_s:.3g} s") from None
            return self.future.result()  # It has begun: a write is never abandoned half-way.


def _too_late(why: str) -> DeadlineExceeded:
    return DeadlineExceeded(
        f"no step boundary: {why}; a step takes longer, or the engine hangs; nothing was written; raise the deadline"
    )


class Boundaries:
    """Actions that wait for their place in the order, by name; every rank arms its own under the same name.

    A name may be armed again, also while it waits: the first that was armed is the first to run.
    """

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self._armed: dict[str, deque[Action]] = {}
        self._disarmed: OrderedDict[str, int] = OrderedDict()
        """How often a name was given up before this rank had armed it."""
        self._closed: Exception | None = None
        self._changed = threading.Condition()

    def arm(self, name: str, action: Action) -> None:
        """Make `action` known; it runs when the loop comes to `Boundary(name)`."""
        with self._changed:
            if self._closed is None and name not in self._disarmed:
                self._armed.setdefault(name, deque()).append(action)
                self._changed.notify_all()
                return
            if self._closed is None:
                self._disarmed[name] -= 1
                if not self._disarmed[name]:
                    del self._disarmed[name]
        action.give_up(self._closed)

    def claim(self, name: str) -> bool:
        """On rank 0, before other ranks hear of the boundary: whether its action is still wanted."""
        with self._changed:
            undecided = (a for a in self._armed.get(name, ()) if not a.decided)
            action = next(undecided, None)
            return action is not None and action.claim()

    def disarm(self, name: str) -> None:
        """Rank 0 has given the action of that name up; so does this rank, where it is armed already or not yet."""
        with self._changed:
            action = self._take(name)
            if action is None:
                self._disarmed[name] = self._disarmed.get(name, 0) + 1
                while len(self._disarmed) > _KEPT_NAMES:
                    self._disarmed.popitem(last=False)
        if action is not None:
            action.give_up()

    def cancel(self, name: str) -> None:
        """Give up whatever waits under that name, unless it has begun; any thread of rank 0 may ask."""
        with self._changed:
            found = list(self._armed.get(name, ()))
        for action in found:
            action.give_up()

    def run(self, name: str) -> None:
        """Run the action of that name; a rank where it is not armed yet waits for it.

        Raises `DeadlineExceeded` where it never comes, or was given up by this rank alone: they have lost each other.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: name in self._armed, self._patience_s):
                raise DeadlineExceeded(
                    f"boundary {name!r} came, but this rank has nothing to do there"
                )
            action = self._take(name)
        assert action is not None
        if not action.claim():
            raise DeadlineExceeded(f"boundary {name!r} came when this rank had given it up alone")
        action()

    def close(self, error: Exception) -> None:
        """The loop has ended: whoever waits for a boundary, and whoever asks from now on, gets `error` at once."""
        with self._changed:
            self._closed = error
            waiting = [action for armed in self._armed.values() for action in armed]
            self._armed.clear()
        for action in waiting:
            action.give_up(error)

    def _take(self, name: str) -> Action | None:
        armed = self._armed.get(name)
        if not armed:
            return None
        action = armed.popleft()
        if not armed:
            del self._armed[name]
        return action


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
