"""Which tokens are computed next: requests, batches, and the scheduler that makes the second from the first."""

from .batch import SampleRow, ScheduledBatch, ScheduledItem
from .request import Request, SampleGroup
from .scheduler import Scheduler, SchedulerConfig

__all__ = [
    "Request",
    "SampleGroup",
    "SampleRow",
    "ScheduledBatch",
    "ScheduledItem",
    "Scheduler",
    "SchedulerConfig",
]
