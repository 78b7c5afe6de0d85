"""The engine's end of an arena, and the one of a trainer in the same process."""

from __future__ import annotations

from typing import Protocol

import torch

from ..plan.plan import Plan
from ..transports.arena import SharedBytes
from ..wire.messages import ProcessRef
from ..wire.process import current_process
from .stage import ArenaStage, Stage


class OpenedArena(Protocol):
    """The engine's end."""

    @property
    def owner(self) -> ProcessRef:
        """The trainer; when it dies, the arena is of no use."""

    @property
    def unstaged(self) -> bool:
        """Its bytes are written as they come: an update must be complete."""

    def stage(self, plan: Plan) -> Stage:
        """Where a session's bytes wait for its commit; `TransportError` when the arena is too small for the plan."""

    def refuse(self) -> None:
        """A bucket was announced and not taken. What carries it must not take its bytes for those of another one."""

    def given_up(self) -> bool:
        """The trainer has certainly closed its end, or left it, although it may not have been able to say so."""

    def close(self) -> None:
        """Give the mapping back. Safe to repeat."""


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
