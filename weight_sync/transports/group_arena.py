"""An arena that travels: the trainer's bytes are broadcast over an update group, and every engine rank keeps its part.

The trainer packs into ordinary memory and announces a bucket; each rank that hears of it receives those bytes, chunk by
chunk, into the stage of its session. Both ends cut the bytes alike, from the manifest and the announced tensors alone.
"""

from collections.abc import Sequence
from concurrent.futures import Future

import torch

from ..layout.memory import Range
from ..process_groups.communicator import keep_until_aborted
from ..wire.messages import GroupHandle
from ..wire.process import current_process
from .trainer_group import TrainerGroup


class GroupArena:
    """The trainer's end: memory of its own, and the group that carries it."""

    def __init__(self, num_bytes: int, group: TrainerGroup) -> None:
        self._group = group
        self._buffer: torch.Tensor | None = torch.zeros(
            num_bytes, dtype=torch.uint8, device=group.device
        )
        self._num_bytes = num_bytes

    @property
    def buffer(self) -> torch.Tensor:
        assert self._buffer is not None, "the arena was closed"
        return self._buffer

    @property
    def handle(self) -> GroupHandle:
        return GroupHandle(
            owner=current_process(),
            group_name=self._group.name,
            num_bytes=self._num_bytes,
            ends_group=True,
        )

    @property
    def broken(self) -> str | None:
        """Why nothing can be sent any more, or None."""
        return self._group.broken

    def send(self, ranges: Sequence[Range], timeout_s: float) -> "Future[None] | None":
        """Broadcast these bytes; they must not change until the future is done."""
        return self._group.broadcast(self.buffer, ranges, timeout_s=timeout_s) if ranges else None

    def close(self) -> None:
        buffer, self._buffer = self._buffer, None
        self._group.destroy()
        keep_until_aborted(buffer)
