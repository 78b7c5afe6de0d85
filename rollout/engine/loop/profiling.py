"""Profiles of the engine loop, and what is left out of garbage collections; both between two steps."""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from weight_sync.wire.rpc import Call

from ...errors import RolloutError
from ...protocol import commands as cmd
from ...runner.model_runner import ModelRunner
from .expert_record import ExpertRecord
from .pipeline import StepPipeline


def observers(
    pipeline: StepPipeline, runner: ModelRunner, rank: int
) -> dict[type, Callable[[Call], None]]:
    """The handlers of all commands that watch an engine loop and change no result, by command."""
    return Profiling(pipeline, rank).handlers() | ExpertRecord(runner).handlers()


class Profiling:
    """Runs torch's profiler on the loop's thread; parts of a step are ranges of the trace while it does."""

    def __init__(self, pipeline: StepPipeline, rank: int) -> None:
        self._pipeline = pipeline
        self._rank = rank
        self._profile: Any = None

    def handlers(self) -> dict[type, Callable[[Call], None]]:
        """By command."""
        return {
            cmd.StartProfile: self._start,
            cmd.StopProfile: self._stop,
            cmd.FreezeGc: self._freeze,
        }

    def _start(self, call: Call) -> None:
        if self._profile is not None:
            raise RolloutError("cannot start a profile: got one under way; call stop_profile first")
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profile = torch.profiler.profile(activities=activities)
        self._profile.start()
        self._pipeline.named = torch.profiler.record_function
        call.reply(cmd.Done())

    def _stop(self, call: Call) -> None:
        if self._profile is None:
            raise RolloutError("cannot stop a profile: got none; call start_profile first")
        profile, self._profile = self._profile, None
        self._pipeline.named = nullcontext
        profile.stop()
        folder = tempfile.mkdtemp(prefix="rollout-profile-")
        path = os.path.join(folder, f"rank-{self._rank}.json.gz")
        profile.export_chrome_trace(path)
        call.reply(cmd.ProfileWritten(path=path))

    def _freeze(self, call: Call) -> None:
        gc.collect()
        gc.freeze()
        call.reply(cmd.Done(count=gc.get_freeze_count()))
