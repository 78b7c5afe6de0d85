"""An engine rank's end of an arena in shared memory: the bytes, where the trainer wrote them."""

from __future__ import annotations

from ..plan.plan import Plan
from ..transports.shared_memory import MappedMemoryFile
from .stage import ArenaStage, Stage


class OpenedSharedMemoryArena(MappedMemoryFile):
    """Mapped for reading alone."""

    def stage(self, plan: Plan) -> Stage:
        return ArenaStage(self.buffer, plan)
