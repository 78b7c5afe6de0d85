"""What an engine has computed since its start, and one log line about it every few seconds."""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections.abc import Callable

from ...protocol.commands import STEP_EDGES_S
from ...scheduling.batch import ScheduledBatch
from ...scheduling.scheduler import Scheduler

logger = logging.getLogger("rollout.throughput")


class ThroughputLog:
    """Counts tokens between lines. Rank 0's alone, and nothing depends on it, so it may look at a clock."""

    def __init__(
        self,
        scheduler: Scheduler,
        interval_s: float | None,
        version: Callable[[], int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._scheduler = scheduler
        self._interval_s = interval_s
        self._version = version
        self._clock = clock
        self.num_decoded = 0
        """Tokens that running requests have drawn."""
        self.num_prompt = 0
        """Tokens of prompts that were computed."""
        self.step_counts = [0] * (len(STEP_EDGES_S) + 1)
        """Steps by how long they took, as in `Status`."""
        self.step_s = 0.0
        """Seconds of all steps together."""
        self._began: float | None = None
        self._num_computed = 0
        self._num_decoded = 0
        if interval_s is not None:
            logger.setLevel(min(logger.getEffectiveLevel(), logging.INFO))

    def note(self, batch: ScheduledBatch, seconds: float) -> None:
        """Count a step that took `seconds`; logs a line when the last one is old enough, or there is no more work."""
        self.step_counts[bisect_left(STEP_EDGES_S, seconds)] += 1
        self.step_s += seconds
        self.num_decoded += batch.num_decodes
        self.num_prompt += batch.num_tokens - batch.num_decodes
        if self._interval_s is None:
            return
        now = self._clock()
        if self._began is None:
            self._began = now
        self._num_computed += batch.num_tokens
        self._num_decoded += batch.num_decodes
        elapsed = now - self._began
        if elapsed >= self._interval_s or not self._scheduler.has_work:
            self._log(max(elapsed, 1e-9))
            self._began = now if self._scheduler.has_work else None

    def _log(self, elapsed: float) -> None:
        scheduler, kv = self._scheduler, self._scheduler.kv
        logger.info(
            "version %d: %d running, %d waiting; %.0f decoded and %.0f prompt tokens/s; KV %.0f %% in use",
            self._version(),
            scheduler.num_running,
            scheduler.num_waiting,
            self._num_decoded / elapsed,
            (self._num_computed - self._num_decoded) / elapsed,
            100.0 * kv.num_held / kv.num_blocks,
        )
        self._num_computed = self._num_decoded = 0
