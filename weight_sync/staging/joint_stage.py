"""The stage of a session whose tensors come both ways: through an arena that both ends see, and over a group."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from .joined_group import JoinedGroup
from .shadow_stage import ShadowStage, StageMemory
from .stage import ArenaStage, Check, Fill
from .uploaded_arena import UploadedStage


class JointStage:
    """Checks the arena's tensors where they lie, and keeps them beside those of the group.

    A session becomes one when its first tensors come over a group.
    """

    def __init__(
        self,
        arena: ArenaStage | UploadedStage,
        memory: StageMemory,
        group: JoinedGroup,
        rows: np.ndarray,
    ) -> None:
        """`rows`: those of the arena that are complete, ascending."""
        self._arena = arena
        self._memory: StageMemory | None = memory
        memory.hold()
        try:
            self._kept = ShadowStage(memory, group, arena.plan.manifest.arena_bytes, arena.plan)
            self._keep(rows)
        except BaseException:
            memory.let_go()
            raise

    def accept(
        self, rows: np.ndarray, check: Check, timeout_s: float, at: int | None = None
    ) -> float:
        seconds = self._arena.accept(rows, check, timeout_s, at)
        self._keep(rows)
        return seconds

    def receive(self, num_bytes: int, fill: Fill) -> torch.Tensor:
        return self._kept.receive(num_bytes, fill)

    def put(self, sources: Mapping[int, torch.Tensor]) -> np.ndarray:
        return self._kept.put(sources)

    @property
    def in_parts(self) -> bool:
        return self._arena.in_parts

    def summands(self, rows: np.ndarray | None) -> np.ndarray:
        return self._arena.summands(rows)

    def write(self, rows: np.ndarray | None, *, read_back: bool = False) -> None:
        self._kept.write(rows)

    def after_write(self) -> None:
        self._kept.after_write()

    def can_take_back(self) -> bool:
        return self._kept.can_take_back()

    def take_back(self) -> None:
        self._kept.take_back()

    def release(self) -> None:
        self._kept.release()
        self._arena.release()
        memory, self._memory = self._memory, None
        if memory is not None:
            memory.let_go()

    def _keep(self, rows: np.ndarray) -> None:
        if isinstance(
            self._arena, ArenaStage
        ):  # what was uploaded is beside the group's tensors already
            self._kept.put(self._arena.tensors(rows))
