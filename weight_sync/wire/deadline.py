"""A point in time that the calls of one operation share."""

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
