"""NeMo-RL's checkpoint-engine lifecycle, walked through as its synchronizer does."""

from __future__ import annotations

import asyncio
import importlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from versions import version_weights

from rollout import Engine
from rollout.errors import ConfigError
from trainers_integration.demo.config import ModelConfig
from trainers_integration.demo.model import build_model, save_checkpoint
from trainers_integration.demo.tokenizer import build_tokenizer

BACKEND = "trainers_integration.nemo_rl:PublishingCheckpointEngine"


def create(addresses: Any, **options: Any) -> Any:
    """As NeMo-RL makes one from its configuration."""
    module, name = BACKEND.split(":")
    made: Any = getattr(importlib.import_module(module), name)
    return made(bucket_size=1 << 20, addresses=addresses, timeout_s=30.0, **options)


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


def test_what_later_versions_ask_of_a_plug_is_there(tiny_checkpoint: Callable[..., Path]) -> None:
    """`release_after_refit` is among its options, workers of Megatron ask for a layout, those of vLLM for a flag."""
    folder = tiny_checkpoint("llama")
    with Engine(folder, skip_tokenizer_init=True, kv_cache_bytes=1 << 20) as engine:
        rank = create([engine.address], release_after_refit=True)
        assert rank.get_target_weight_layout() is None
        assert not rank.shard_expert_weights and not rank.shard_hf_weights
        rank.init_policy_process_group(
            worker_rank=0, train_world_size=1, rollout_world_size=0, metadata=[rank.prepare()]
        )
        for number in (1, 2):
            tensors = version_weights(folder, number)
            asyncio.run(rank.send_weights(stream(tensors, [])))
            assert rank._pusher is not None
            rank.finalize()
            assert rank._pusher is None  # its memory is given back
            assert engine.status().version == number


@pytest.mark.timeout(600)
def test_the_example_runs(tmp_path: Path) -> None:
    save_checkpoint(
        tmp_path, build_model(ModelConfig(hidden_size=32, num_layers=2), seed=0), build_tokenizer()
    )
    result = subprocess.run(
        [sys.executable, "examples/nemo_rl_refit.py", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert result.returncode == 0, result.stderr
    found = re.findall(r"step \d: .* at most (\S+), version (\d)", result.stdout)
    assert [version for _, version in found] == ["1", "2", "3"], result.stdout
    assert max(float(gap) for gap, _ in found) < 1e-4
    assert "bit for bit" in result.stdout


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


def test_an_option_that_nobody_knows_is_refused_before_a_refit() -> None:
    with pytest.raises(ConfigError, match=r"refit_cfg: got device, shard_expert_weights, expected"):
        create(["tcp://127.0.0.1:1"], shard_expert_weights=True, device="cuda")


@pytest.mark.parametrize("addresses", [[], "tcp://127.0.0.1:1"])
def test_addresses_are_a_list_of_at_least_one(addresses: Any) -> None:
    with pytest.raises(ConfigError, match="addresses"):
        create(addresses)
