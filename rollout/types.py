"""Small types that several parts of the engine share."""

from __future__ import annotations

from enum import Enum
from typing import Literal

PauseMode = Literal["abort", "retract", "in_place"]
"""What a pause does with running requests: end them, give their KV back, or freeze them as they are."""


class RequestStatus(Enum):
    """Where a request is in its life; only the scheduler changes it."""

    NEW = "new"
    """Not yet given to a scheduler."""
    WAITING = "waiting"
    """Known to the scheduler, owns no KV block."""
    RUNNING = "running"
    """Owns KV blocks; takes part in steps."""
    FINISHED = "finished"
    """Finished or aborted; the scheduler has forgotten it."""
