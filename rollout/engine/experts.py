"""Which experts tokens go to, counted by the engine, with their `async_` twins."""

from __future__ import annotations

from typing import Any

from ..protocol.commands import ExpertCounts, RecordExperts
from .info import InfoCalls
from .twins import Asking, asks, awaitable


class ExpertCalls(InfoCalls):
    """The part of `Engine` that looks at the experts of a mixture."""

    @asks
    def start_expert_distribution_record(self) -> Asking[None]:
        """Count, from zero, how often tokens go to each expert. Raises `RolloutError` for a model without any.

        While it counts, decode steps on a GPU run without graphs.
        """
        yield RecordExperts(action="start")

    async_start_expert_distribution_record = awaitable(start_expert_distribution_record)

    @asks
    def stop_expert_distribution_record(self) -> Asking[None]:
        """Count no more; what was counted can still be dumped."""
        yield RecordExperts(action="stop")

    async_stop_expert_distribution_record = awaitable(stop_expert_distribution_record)

    @asks
    def dump_expert_distribution_record(self) -> Asking[Any]:
        """The counts so far: int64 array (layers, experts), zeros in layers without any; a pool's are all replicas'.

        Raises `RolloutError` when nothing was ever started.
        """
        answer: ExpertCounts = yield RecordExperts(action="dump")
        import numpy as np

        return np.frombuffer(answer.data, dtype="<i8").astype(np.int64).reshape(answer.shape)

    async_dump_expert_distribution_record = awaitable(dump_expert_distribution_record)
