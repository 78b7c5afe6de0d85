"""What may be changed about an engine loop while it runs: how fast it goes, and how much it takes at once."""

from __future__ import annotations

from collections.abc import Callable

from weight_sync.wire.rpc import Call

from ...errors import InvalidRequestError
from ...protocol import commands as cmd
from ...scheduling.scheduler import Scheduler, SchedulerConfig
from .pipeline import StepPipeline


class Tuning:
    """Handlers for the engine loop, on its thread; all ranks carry them out at one place in their order."""

    def __init__(self, pipeline: StepPipeline, scheduler: Scheduler) -> None:
        self._pipeline = pipeline
        self._scheduler = scheduler
        self._most = scheduler.config

    def handlers(self) -> dict[type, Callable[[Call], None]]:
        """By command."""
        return {cmd.SlowDown: self._slow_down, cmd.SetLimits: self._limit}

    def _slow_down(self, call: Call) -> None:
        self._pipeline.delay_s = call.body.seconds
        call.reply(cmd.Done())

    def _limit(self, call: Call) -> None:
        present, values = self._scheduler.config, {}
        for name in ("max_running_requests", "chunked_prefill_size"):
            asked, most = getattr(call.body, name), getattr(self._most, name)
            if asked is not None and asked > most:
                raise InvalidRequestError(
                    f"{name}: got {asked}, expected at most {most}, for which memory was set aside at the start"
                )
            values[name] = getattr(present, name) if asked is None else asked
        self._scheduler.limit(SchedulerConfig(**values))
        call.reply(cmd.Done())
