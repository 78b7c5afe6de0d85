"""A point in time that the calls of one operation share, and what a peer's clock shows then."""

import concurrent.futures
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol

from ..errors import DeadlineExceeded, SessionError
from .cancellation import current_cancellation


class Submits(Protocol):
    """What `Deadline.call` calls over."""

    def submit(self, message: Any, timeout_s: float) -> "Future[Any]":
        """Send without waiting."""


class Deadline:
    """`timeout_s` from now; and the end of the operation that it belongs to, should its caller cancel it."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._end = time.monotonic() + timeout_s
        self._cancelled = current_cancellation()

    def left_s(self, what: str) -> float:
        """Seconds until then; `DeadlineExceeded` when it has passed, `SessionError` when the caller has cancelled."""
        self.check_wanted()
        left = self._end - time.monotonic()
        if left <= 0:
            raise DeadlineExceeded(
                f"the update took longer than its {self.timeout_s:.3f} s (at: {what}); expected it to end in time; "
                "raise timeout_s, or look at what keeps the engine"
            )
        return left

    def grace_s(self, most_s: float) -> float:
        """Seconds for what has to be done when an operation has failed: what is left, a moment at least."""
        most_s = min(most_s, 1.0) if self._is_cancelled else most_s
        return min(most_s, max(0.25, self._end - time.monotonic()))

    def check_wanted(self) -> None:
        """`SessionError` when the caller has cancelled."""
        if self._is_cancelled:
            raise SessionError("the update was cancelled by its caller; nothing of it was written")

    def when_cancelled(self, action: Callable[[], object]) -> None:
        """Do this at once should the caller cancel, on its thread; it must not block."""
        if self._cancelled is not None:
            self._cancelled.add_done_callback(lambda _: action())

    def wait(self, future: "Future[Any]", what: str) -> Any:
        """The result of a submitted call, or `DeadlineExceeded`; whatever arrives later is dropped."""
        left_s = self.left_s(what)
        try:
            if self._cancelled is None:
                return future.result(left_s)
            concurrent.futures.wait(
                (future, self._cancelled), left_s, concurrent.futures.FIRST_COMPLETED
            )
            if not future.done():
                self.check_wanted()
            return future.result(0)
        except TimeoutError as error:
            if isinstance(error, DeadlineExceeded):
                if type(error) is not DeadlineExceeded or time.monotonic() < self._end:
                    raise
                raise DeadlineExceeded(
                    f"{error} (these were the last of {self.timeout_s:.3f} s for the whole update)"
                ) from error
            raise DeadlineExceeded(
                f"{what} was not answered within the {self.timeout_s:.3f} s of the whole update; whatever arrives "
                "later is dropped; raise timeout_s, or look at what keeps the engine"
            ) from None

    def call(self, channel: Submits, message: Any) -> Any:
        """Send, wait, return the reply or raise what the other side raised."""
        what = type(message).__name__
        return self.wait(channel.submit(message, self.left_s(what)), what)

    @property
    def _is_cancelled(self) -> bool:
        return self._cancelled is not None and self._cancelled.done()


class PeerClock:
    """What the peer's monotonic clock shows at moments of ours, from the times that it puts into its replies.

    A reply is older than its arrival, so what is known is a bound: the peer's clock shows at least so much. Of several
    bounds the highest is best, as long as the clocks have not drifted apart since. Not thread safe.
    """

    FRESH_S = 60.0
    """Clocks drift: how long a bound is believed."""

    def __init__(self) -> None:
        self._ahead = 0.0
        self._noted: float | None = None

    def note(self, peer_time: float, now: float) -> None:
        """At our `now` there is a message that the peer wrote at its `peer_time`."""
        ahead = peer_time - now
        if self._noted is None or not self.is_fresh(now) or ahead >= self._ahead:
            self._ahead, self._noted = ahead, now

    def is_fresh(self, now: float) -> bool:
        """Whether `at` is to be believed."""
        return self._noted is not None and now - self._noted <= self.FRESH_S

    def at(self, moment: float) -> float:
        """What the peer's clock shows at our `moment`, or less; never more."""
        return moment + self._ahead
