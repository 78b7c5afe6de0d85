"""A point in time that the calls of one operation share, and what a peer's clock shows then."""

import time

from ..errors import DeadlineExceeded


class Deadline:
    """`timeout_s` from now."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._end = time.monotonic() + timeout_s

    def left_s(self, what: str) -> float:
        """Seconds until then; `DeadlineExceeded` when it has passed."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise DeadlineExceeded(
                f"the update took longer than its {self.timeout_s:.3f} s (at: {what}); expected it to end in time; "
                "raise timeout_s, or look at what keeps the engine"
            )
        return left


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
