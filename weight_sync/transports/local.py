"""Trainer and engine in one process: the engine reads the trainer's buffer itself."""

import mmap

import torch

from ..plan.plan import Plan
from ..plan.stage import ArenaStage
from ..wire.messages import LocalHandle, ProcessRef
from ..wire.process import current_process
from .arena import Mapping, SharedBytes


class LocalArena(SharedBytes):
    """The trainer's end; `lend` gives the buffer to the service and returns the key under which it is known there."""

    def __init__(self, num_bytes: int) -> None:
        self._mapping = Mapping(-1, max(num_bytes, mmap.PAGESIZE), writable=True)
        self._num_bytes = num_bytes
        self.key = ""

    @property
    def buffer(self) -> torch.Tensor:
        return self._mapping.tensor[: self._num_bytes]

    @property
    def handle(self) -> LocalHandle:
        return LocalHandle(key=self.key, num_bytes=self._num_bytes)

    def close(self) -> None:
        self._mapping.close()


class OpenedLocalArena(SharedBytes):
    """The engine's end: the same tensor."""

    def __init__(self, buffer: torch.Tensor) -> None:
        self._buffer: torch.Tensor | None = buffer

    @property
    def buffer(self) -> torch.Tensor:
        assert self._buffer is not None, "the arena was closed"
        return self._buffer

    @property
    def owner(self) -> ProcessRef:
        return current_process()

    def stage(self, plan: Plan) -> ArenaStage:
        return ArenaStage(self.buffer, plan)

    def close(self) -> None:
        self._buffer = None
