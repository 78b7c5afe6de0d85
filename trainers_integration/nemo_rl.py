"""NeMo-RL's plug for checkpoint engines: its policy workers publish into our engines.

    policy.generation.refit_transport: "trainers_integration.nemo_rl:PublishingCheckpointEngine"

NeMo-RL makes one in every policy worker and walks through its lifecycle, at each refit or once for all of them. Its own
generation workers run vLLM or SGLang, which this cannot feed: it refuses to be used there rather than leave them with
old weights.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

import torch

from rollout.errors import ConfigError

from .pushing import Pusher, Weights, checked_options, exhaust, exhausted_on_error


class PublishingCheckpointEngine:
    """Rank 0 of the policy publishes every refit as one version to all `addresses`; other ranks only keep step.

    `bucket_size` (bytes) comes from NeMo-RL; the rest is what the configuration has under this class's path: the
    addresses of engines and pools, whether `finalize` gives memory back, and options of `WeightPublisher`.
    """

    cleanup_after_load = True
    # Both names that the base class has had for it: every rank's iterator gives whole tensors.
    shard_hf_weights = False
    shard_expert_weights = False

    def __init__(
        self,
        bucket_size: int,
        *,
        addresses: Sequence[str] = (),
        release_after_refit: bool = False,
        **publisher_options: Any,
    ) -> None:
        if isinstance(addresses, str) or not addresses:
            raise ConfigError(
                f"addresses: got {'one text' if addresses else 'none'}, expected a list with the address of at least "
                "one engine (Engine.address); it stands under this class's path in policy.generation.refit_cfg"
            )
        self._addresses = list(addresses)
        self._bucket_bytes = bucket_size
        self._options = checked_options(publisher_options, "policy.generation.refit_cfg")
        self._releases = release_after_refit or torch.cuda.is_available()
        self._sends = False
        self._pusher: Pusher | None = None

    def prepare(self) -> dict[str, Any]:
        """Nothing is allocated before the first refit."""
        return {}

    def get_target_weight_layout(self) -> None:
        """None: whole tensors are wanted; each rank of an engine keeps its part itself."""

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
        """Give memory back where training needs it, on a GPU or by `release_after_refit`; elsewhere the next refit uses
        it again."""
        if self._releases and self._pusher is not None:
            self._pusher.close()
            self._pusher = None
