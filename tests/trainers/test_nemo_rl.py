"""NeMo-RL's checkpoint-engine lifecycle, walked through as its synchronizer does."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from versions import version_weights

from rollout import Engine
from rollout.errors import ConfigError

BACKEND = "trainers_integration.nemo_rl:PublishingCheckpointEngine"


def create(addresses: Any) -> Any:
    """As NeMo-RL makes one from its configuration."""
    module, name = BACKEND.split(":")
    made: Any = getattr(importlib.import_module(module), name)
    return made(bucket_size=1 << 20, addresses=addresses, timeout_s=30.0)


def stream(tensors: dict[str, torch.Tensor], walked: list[str]) -> Iterator[Any]:
    for name, tensor in tensors.items():
        walked.append(name)
        yield name, tensor


def test_each_refit_is_one_version_on_all_engines_and_every_rank_keeps_step(
    tiny_checkpoint: Callable[..., Path],
) -> None:
    folder = tiny_checkpoint("llama")
    options: dict[str, Any] = {"skip_tokenizer_init": True, "kv_cache_bytes": 1 << 20}
    with Engine(folder, **options) as one, Engine(folder, **options) as two:
        ranks = [create([one.address, two.address]) for _ in range(2)]
        for number in (1, 2):
            tensors = version_weights(folder, number)
            metadata = [rank.prepare() for rank in ranks]
            for i, rank in enumerate(ranks):
                rank.init_policy_process_group(
                    worker_rank=i, train_world_size=2, rollout_world_size=0, metadata=metadata
                )
            for rank in ranks:
                walked: list[str] = []
                asyncio.run(rank.send_weights(stream(tensors, walked)))
                assert walked == list(tensors)
                rank.finalize()
            assert [engine.status().version for engine in (one, two)] == [number, number]
            assert one.weights_fingerprint() == two.weights_fingerprint()


def test_it_refuses_to_leave_workers_of_another_engine_behind() -> None:
    rank = create(["tcp://127.0.0.1:1"])
    with pytest.raises(ConfigError, match="generation has to go there"):
        rank.init_rollout_process_group(
            rollout_rank=0, train_world_size=1, rollout_world_size=1, metadata=[]
        )

    async def receive() -> None:
        async for _ in rank.receive_weight_batches():
            pass

    with pytest.raises(ConfigError):
        asyncio.run(receive())


@pytest.mark.parametrize("addresses", [[], "tcp://127.0.0.1:1"])
def test_addresses_are_a_list_of_at_least_one(addresses: Any) -> None:
    with pytest.raises(ConfigError, match="addresses"):
        create(addresses)
