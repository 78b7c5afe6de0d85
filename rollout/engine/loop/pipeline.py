"""Steps in order, and, where that pays, one ahead: the next one is launched before the tokens of the last are known.

    schedule N+1 -> launch N+1 -> take in the tokens of N -> complete N+1, draw or find drawn its tokens -> schedule N+2

While the device computes step N+1 the host looks at the tokens of step N, hands them out, and prepares step N+2.
Requests that a token of step N ends are part of step N+1 all the same; what it computes for them is dropped, so nobody
sees anything past a stop, and their blocks were theirs until then. A request that ends by its length is known to end,
and is not scheduled again. Commands that could notice wait until the step under way is taken in.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from ...layers.sampler import TokenSampler
from ...runner.model_runner import ModelRunner
from ...scheduling.batch import ScheduledBatch
from ...scheduling.scheduler import Scheduler
from .postprocess import Flight, Postprocessor


class StepPipeline:
    """Runs the steps of one rank; on the engine loop's thread alone."""

    def __init__(
        self,
        *,
        scheduler: Scheduler,
        runner: ModelRunner,
        post: Postprocessor,
        sampler: TokenSampler,
        ahead: bool,
        fail: Callable[[ScheduledBatch, Exception], None],
        note: Callable[[ScheduledBatch, float], None],
    ) -> None:
        """`note(batch, seconds)` hears of every step that was taken in, and how long after the one before, or after its
        own beginning where none was under way."""
        self._scheduler = scheduler
        self._runner = runner
        self._post = post
        self._sampler = sampler
        self._fail = fail
        self._note = note
        self.ahead = ahead
        """Launch a step before the last one's tokens are known."""
        self._flight: Flight | None = None
        self._began = 0.0
        self.named: Callable[[str], AbstractContextManager[Any]] = nullcontext
        """The context of a part of a step, by its name; a profiler's range while there is one."""
        self.delay_s = 0.0
        """Seconds to wait before each step: a test's wish, the same on all ranks."""

    def step(self) -> bool:
        """Launch one batch and take in the one before (or itself, when not ahead); False if there was nothing to do."""
        if self._flight is None:
            self._began = time.perf_counter()
        if self.delay_s:
            time.sleep(self.delay_s)
        with self.named("schedule"):
            batch = self._scheduler.schedule()
        if batch is None:
            return self.drain()
        flight = self._flight
        drawn = None if flight is None else flight.drawn(self._sampler)
        what = f"{batch.forward_mode.value}: {len(batch.items)} requests, {batch.num_tokens} tokens"
        try:
            with self.named(what):
                launched = self._runner.launch(batch, drawn)
        except Exception as error:
            self.drain()
            self._fail(batch, error)
            return True
        self.drain()
        try:
            rows = self._scheduler.complete(batch)
            with self.named("sampler"):
                self._flight = self._post.sample(batch, launched, rows)
        except Exception as error:
            self._fail(batch, error)
        if not self.ahead:
            self.drain()
        return True

    def drain(self) -> bool:
        """Take in the step under way, after which no token is pending; False if there was none."""
        flight, self._flight = self._flight, None
        if flight is None:
            return False
        try:
            with self.named("take in the tokens"):
                self._post.land(flight)
        except Exception as error:
            self._fail(flight.batch, error)
        now = time.perf_counter()
        self._note(flight.batch, now - self._began)
        self._began = now
        return True
