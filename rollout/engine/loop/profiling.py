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
from ...runner.profile_ranges import Named
from .expert_record import ExpertRecord
from .pipeline import StepPipeline
from .weight_host import EngineWeightHost


def observers(
    pipeline: StepPipeline, runner: ModelRunner, host: EngineWeightHost, rank: int
) -> dict[type, Callable[[Call], None]]:
    """The handlers of all commands that watch an engine loop and change no result, by command."""
    return Profiling(pipeline, runner, host, rank).handlers() | ExpertRecord(runner).handlers()


class Profiling:
    """Runs torch's profiler on all threads of this process. While it does, these are ranges of the trace:

    - a step's launch, such as "mixed: 3 requests, 70 tokens"; beside it "schedule", "sampler" and "take in the tokens"
    - kinds of layers, "attention", "ffn" and "norm", of steps that are launched layer by layer. What a CUDA graph holds
      runs without the host: its kernels are there, by their names alone.
    - phases of an update, "receive", "stage", "commit" and "verify"; "pack" in a profile of the trainer's process

    torch has one profile in a process at a time.
    """

    def __init__(
        self, pipeline: StepPipeline, runner: ModelRunner, host: EngineWeightHost, rank: int
    ) -> None:
        self._pipeline = pipeline
        self._runner = runner
        self._host = host
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
        if torch.autograd.profiler._is_profiler_enabled:  # torch would crash
            raise RolloutError(
                "cannot start a profile: got one of torch's under way in this process, expected none; stop it first, "
                "or use an executor with a process of its own"
            )
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        # Staged bytes are checked on a thread of their own.
        everywhere = torch.profiler._ExperimentalConfig(profile_all_threads=True)
        self._profile = torch.profiler.profile(
            activities=activities, experimental_config=everywhere
        )
        self._profile.start()
        self._name(torch.profiler.record_function)
        call.reply(cmd.Done())

    def _stop(self, call: Call) -> None:
        if self._profile is None:
            raise RolloutError("cannot stop a profile: got none; call start_profile first")
        profile, self._profile = self._profile, None
        self._name(None)
        profile.stop()
        folder = tempfile.mkdtemp(prefix="rollout-profile-")
        path = os.path.join(folder, f"rank-{self._rank}.json.gz")
        profile.export_chrome_trace(path)
        call.reply(cmd.ProfileWritten(path=path))

    def _name(self, named: Named | None) -> None:
        self._pipeline.named = self._host.named = nullcontext if named is None else named
        self._runner.name_parts(named)

    def _freeze(self, call: Call) -> None:
        gc.collect()
        gc.freeze()
        call.reply(cmd.Done(count=gc.get_freeze_count()))
