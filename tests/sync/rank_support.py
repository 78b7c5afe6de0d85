"""Ranks of one engine that are threads of one process."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from weight_sync.errors import EngineDiedError

NUM_RANKS = 2
PATIENCE_S = 60.0


class Meeting:
    """Where the ranks exchange things; a rank that waits here alone is what must never be."""

    def __init__(self) -> None:
        self._barrier = threading.Barrier(NUM_RANKS)
        self._slots: list[Any] = [None] * NUM_RANKS
        self.alone = False

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self._slots[rank] = value
        try:
            self._barrier.wait(PATIENCE_S)
            found = list(self._slots)
            self._barrier.wait(PATIENCE_S)
        except threading.BrokenBarrierError:
            self.alone = True
            raise EngineDiedError("a rank waited alone") from None
        return found


class ThreadAgreement:
    """`RankAgreement` of ranks that are threads."""

    size = NUM_RANKS

    def __init__(self, rank: int, meeting: Meeting) -> None:
        self.rank = rank
        self._meeting = meeting

    def gather(self, values: np.ndarray) -> np.ndarray:
        return np.stack(self._meeting.exchange(self.rank, values))

    def gather_text(self, text: str) -> list[str]:
        return self._meeting.exchange(self.rank, text)
