"""How many times tokens went to each expert, between two commands; all of it between two steps."""

from __future__ import annotations

from collections.abc import Callable

import torch

from weight_sync.wire.rpc import Call

from ...errors import RolloutError
from ...protocol import commands as cmd
from ...runner.model_runner import ModelRunner


class ExpertRecord:
    """Every rank counts, and all come to the same: each routes all tokens."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self._counts: torch.Tensor | None = None

    def handlers(self) -> dict[type, Callable[[Call], None]]:
        """By command."""
        return {cmd.RecordExperts: self._carry_out}

    def _carry_out(self, call: Call) -> None:
        action = call.body.action
        if self._runner.model_config.moe is None:
            raise RolloutError(
                "cannot record the distribution of experts: got a model without any; ask an engine of a mixture"
            )
        if action == "start":
            self._counts = self._runner.count_experts(True)
        elif self._counts is None:
            raise RolloutError(
                f"cannot {action} a record of experts: got none; call start_expert_distribution_record first"
            )
        elif action == "stop":
            self._runner.count_experts(False)
        else:
            num_layers, num_experts = self._counts.shape
            data = self._counts.cpu().numpy().astype("<i8").tobytes()
            call.reply(cmd.ExpertCounts(shape=(num_layers, num_experts), data=data))
            return
        call.reply(cmd.Done())
