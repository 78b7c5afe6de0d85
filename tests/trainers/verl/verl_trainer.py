"""A trainer's worker as verl's managers see one; it notes how far its streams of tensors went."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from verl.single_controller.base import Worker
from verl.single_controller.base.decorator import Dispatch, register
from versions import version_weights

from trainers_integration.verl.adapter import ServerAdapter
from trainers_integration.verl.checkpoint_engine import PublishingCheckpointEngine


class TrainerWorker(Worker):
    """One rank; `mode="naive"` pushes through the adapter of a hybrid replica, else the checkpoint engine does."""

    def __init__(self, folder: str, rollout_config: Any = None) -> None:
        super().__init__()
        self._folder = folder
        self._walked: list[str] = []
        self._sender = PublishingCheckpointEngine(
            bucket_size=1 << 20, is_master=self.rank == 0, timeout_s=60.0
        )
        self._adapter = None
        if rollout_config is not None:
            self._adapter = ServerAdapter(rollout_config, None, None)

    def _stream(self, number: int) -> Iterator[tuple[str, torch.Tensor]]:
        from pathlib import Path

        self._walked = []
        for name, tensor in version_weights(Path(self._folder), number).items():
            self._walked.append(name)
            yield name, tensor

    @register(dispatch_mode=Dispatch.ONE_TO_ALL, blocking=False)
    async def update_weights(self, global_steps: int = 0, mode: str = "auto") -> dict[str, float]:
        weights = self._stream(global_steps)
        if mode != "naive":
            return await self._sender.send_weights(weights, global_steps=global_steps)
        assert self._adapter is not None
        await self._adapter.resume(tags=["weights"])
        await self._adapter.update_weights(weights, global_steps=global_steps)
        await self._adapter.resume(tags=["kv_cache"])
        return {}

    @register(dispatch_mode=Dispatch.DP_COMPUTE, blocking=False)
    def execute_checkpoint_engine(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return getattr(self._sender, method)(*args, **kwargs)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def walked(self) -> list[str]:
        return self._walked
