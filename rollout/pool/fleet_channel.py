"""How a publisher of this process reaches all replicas."""

from __future__ import annotations

import time
from concurrent.futures import Future
from typing import Any

import torch

from weight_sync.errors import TransportError
from weight_sync.publisher.channel import wait

from ..engine.executors.executor import InlineCall
from .fleet import FleetWeights


class FleetChannel:
    """`weight_sync.publisher.channel.Channel` to a fleet; tensors go through memory that the replicas map."""

    def __init__(self, fleet: FleetWeights) -> None:
        self._fleet = fleet

    def call(self, message: Any, timeout_s: float) -> Any:
        return wait(self.submit(message, timeout_s), message, timeout_s)

    def submit(self, message: Any, timeout_s: float) -> Future[Any]:
        call = InlineCall(message, time.monotonic() + timeout_s, None)
        self._fleet.handle(call)
        return call.future

    @property
    def is_local(self) -> bool:
        return False

    def lend(self, buffer: torch.Tensor) -> str:
        raise TransportError(
            "the replicas are in other processes: they cannot read a buffer of this one"
        )

    @property
    def dead(self) -> str | None:
        return "the pool was shut down" if self._fleet.closed else None

    def close(self) -> None:
        """Nothing of its own to give back."""
