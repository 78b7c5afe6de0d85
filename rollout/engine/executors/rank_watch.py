"""Sees at once when a rank in a child process ends, whether or not anybody asks, and ends the others."""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from collections.abc import Sequence

from weight_sync.time_left import left_s

from .end_within import END_S
from .rank_process import RankProcess

_LOOK_S = 0.1
"""How often to look where the system does not tell."""


class RankWatch:
    """A rank whose peer has died may wait for it on its GPU, where nothing wakes it up, and may answer meanwhile."""

    def __init__(self, ranks: Sequence[RankProcess]) -> None:
        """`ranks` may still grow until `start`."""
        self._ranks = ranks
        self._lock = threading.Lock()
        self._first: RankProcess | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """From now on the end of one is the end of all. One that was told to end leaves the others time to do so."""
        if len(self._ranks) > 1:
            self._thread = threading.Thread(
                target=self._run, name="rollout-rank-watch", daemon=True
            )
            self._thread.start()

    def why_dead(self) -> str | None:
        """Why the engine is gone: the first of its ranks whose end was seen is; None while all live."""
        first = self._find()
        return None if first is None else first.why_dead()

    def close(self) -> None:
        """All ranks have ended. Safe to repeat."""
        if self._thread is not None:
            self._thread.join(timeout=10.0)

    def _find(self) -> RankProcess | None:
        with self._lock:
            if self._first is None:
                ended = (rank for rank in self._ranks if rank.exit_code is not None)
                self._first = next(ended, None)
            return self._first

    def _run(self) -> None:
        self._await_an_end()
        if all(rank.exit_code in (None, 0) for rank in self._ranks):
            deadline = time.monotonic() + END_S
            for rank in self._ranks:
                rank.wait(left_s(deadline))
        for rank in self._ranks:
            rank.kill()

    def _await_an_end(self) -> None:
        with contextlib.ExitStack() as undo:
            poller, num_lives = select.poll(), 0
            for rank in self._ranks:
                with contextlib.suppress(AttributeError, OSError):
                    life = os.pidfd_open(rank.pid)
                    undo.callback(os.close, life)
                    poller.register(life, select.POLLIN)
                    num_lives += 1
            patience_ms = None if num_lives == len(self._ranks) else 1e3 * _LOOK_S
            while self._find() is None:
                poller.poll(patience_ms)
