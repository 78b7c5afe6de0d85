"""NeMo-RL's plug for checkpoint engines: its policy workers publish into our engines.

    policy.generation.refit_cfg: backend: "trainers_integration.nemo_rl:PublishingCheckpointEngine"

NeMo-RL makes one in every policy worker and walks through its lifecycle at each refit. Its own generation workers run
vLLM, which this cannot feed: it refuses to be used there rather than leave them with old weights.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

import torch

from rollout.errors import ConfigError

from .pushing import Pusher, Weights, exhaust, exhausted_on_error


class PublishingCheckpointEngine:
    """Rank 0 of the policy publishes every refit as one version to all `addresses`; other ranks only keep step.

    `bucket_size` (bytes) comes from NeMo-RL; the rest are its `engine_kwargs`: the addresses of engines and pools, and
    options of `WeightPublisher`.
    """

    cleanup_after_load = True

    def __init__(
        self, bucket_size: int, *, addresses: Sequence[str], **publisher_options: Any
    ) -> None:
        if isinstance(addresses, str) or not addresses:
            raise ConfigError(
                f"engine_kwargs.addresses: got {addresses!r}, expected a list with the address of at least one engine "
                "(Engine.address)"
            )
        self._addresses = list(addresses)
        self._bucket_bytes = bucket_size
        self._options = publisher_options
        self._sends = False
        self._pusher: Pusher | None = None

    def prepare(self) -> dict[str, Any]:
        """Nothing is allocated before the first refit."""
        return {}

    def init_policy_process_group(
        self,
        *,
        worker_rank: int,
        train_world_size: int,
        rollout_world_size: int,
        metadata: list[Any],
    ) -> None:
        """Rank 0 is the one that publishes."""
        self._sends = worker_rank == 0

    def init_rollout_process_group(
        self,
        *,
        rollout_rank: int,
        train_world_size: int,
        rollout_world_size: int,
        metadata: list[Any],
    ) -> None:
        """Refused: whatever generates here would keep its old weights."""
        raise ConfigError(
            "policy.generation: got a worker of NeMo-RL's own that is to receive weights, expected none; engines at "
            f"{', '.join(self._addresses)} receive them, and generation has to go there"
        )

    async def send_weights(self, weights: Weights) -> None:
        """Publish on rank 0; on all ranks `weights` is exhausted, also when the update is refused."""
        if not self._sends:
            await exhaust(weights)
            return
        async with exhausted_on_error(weights) as stream:
            if self._pusher is None:
                self._pusher = Pusher(
                    self._addresses, bucket_bytes=self._bucket_bytes, **self._options
                )
            await self._pusher.push(stream, None)

    async def receive_weight_batches(self) -> AsyncIterator[list[tuple[str, torch.Tensor]]]:
        """Refused, as `init_rollout_process_group` is."""
        raise ConfigError(
            "receive_weight_batches: got a call, expected none: the engines have been sent the weights"
        )
        yield []  # unreachable: it makes this a generator

    def finalize(self) -> None:
        """Give memory back where training needs it; elsewhere the next refit uses it again."""
        if torch.cuda.is_available() and self._pusher is not None:
            self._pusher.close()
            self._pusher = None
