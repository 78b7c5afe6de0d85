"""What is left of the time until a moment, on the monotonic clock: never nothing, which torch takes for "no limit"."""

import time
from datetime import timedelta

LEAST_S = 0.001


def left_s(end: float) -> float:
    """Seconds until `end`, `LEAST_S` where that is close or has passed: for waits that end by themselves then."""
    return max(LEAST_S, end - time.monotonic())


def left(end: float) -> timedelta:
    """The same, as torch takes it."""
    return timedelta(seconds=left_s(end))
