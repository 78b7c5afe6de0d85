"""The stage of one rank of several that see a trainer's arena on a GPU: it reads the bytes that it keeps, no others.

They wait in this rank's shadow of its parameters, as those over a group do. No rank has seen a whole tensor, so the
ranks compare fingerprints together: each has the summands of its parts, and they are added up before anything is
written.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import torch

from ..errors import DeadlineExceeded
from ..plan.plan import Plan
from .shadow_stage import StageMemory
from .stage import Check
from .uploaded_arena import UploadedStage


class PartsStage(UploadedStage):
    """Also where the arena is on this rank's own GPU: all ranks of an engine do alike."""

    in_parts = True

    def __init__(
        self, memory: StageMemory, buffer: torch.Tensor, plan: Plan, *, is_window: bool
    ) -> None:
        super().__init__(memory, buffer, plan, is_window=is_window)
        num_tensors = len(plan.manifest.tensors)
        self._summed = np.zeros(num_tensors, dtype=bool)
        self._values = np.zeros(num_tensors, dtype=np.uint64)

    def accept(
        self, rows: np.ndarray, check: Check, timeout_s: float, at: int | None = None
    ) -> float:
        self._check_place(rows, at)
        assert self._plan is not None, "the session has ended"
        start = time.perf_counter()
        self.memory.before_move()
        with torch.cuda.stream(self._uploads):
            for part, first in self._runs(np.sort(rows.astype(np.int64)), at):
                chunk = self._plan.chunk(part)
                end = first + chunk.manifest.arena_bytes
                self._check_range(end)
                chunk.take(self._buffer[first:end])
            self._note(rows)
        if time.perf_counter() - start > timeout_s:
            raise DeadlineExceeded(
                f"the bucket was not read within the session's lease of {timeout_s:.3f} s; send smaller ones, or raise "
                "lease_s"
            )
        return time.perf_counter() - start

    def summands(self, rows: np.ndarray | None) -> np.ndarray:
        wanted = np.arange(len(self._summed)) if rows is None else rows
        missing = wanted[~self._summed[wanted]]  # those that came over a group
        if len(missing):
            self._note(missing)
        return self._values[wanted]

    def _note(self, rows: np.ndarray) -> None:
        assert self._plan is not None, "the session has ended"
        everything = len(rows) == len(self._summed)
        ascending = np.sort(rows.astype(np.int64))
        self._values[ascending] = self._plan.summands(None if everything else ascending)
        self._summed[ascending] = True

    def _runs(self, rows: np.ndarray, at: int | None) -> Iterator[tuple[np.ndarray, int]]:
        """Tensors that lie one behind the other in the arena, and where the first of them begins."""
        if at is not None:
            yield rows, at
            return
        for run in np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1):
            yield run, self._manifest.offsets[int(run[0])]
