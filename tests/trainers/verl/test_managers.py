"""verl's own managers and clients with two replicas of this engine, on a CPU with logical GPUs.

`make test-verl` runs this: verl asks for an older transformers than the rest, so it has an environment of its own.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from versions import TOLERANCE, Reference, version_weights

from rollout import Engine

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # for `verl_trainer`

PROMPT = [5, 9, 2]
SAMPLED = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": -1,
    "repetition_penalty": 1.0,
    "logprobs": True,
    "ignore_eos": True,
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Ray with more CPUs and GPUs than there are: with too few, verl waits for room for ever."""
    import ray

    with pytest.MonkeyPatch.context() as environment:
        for name, value in (
            ("RAY_USAGE_STATS_ENABLED", "0"),
            ("RAY_AUTH_TOKEN", secrets.token_hex(32)),
            ("OMP_NUM_THREADS", "1"),
            ("PYTHONPATH", os.pathsep.join([*map(str, (HERE, HERE.parents[1])), *sys.path])),
        ):
            environment.setenv(name, value)
        ray.init(
            num_cpus=32,
            num_gpus=8,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            object_store_memory=80 << 20,
        )
        try:
            yield
        finally:
            ray.shutdown()


@pytest.fixture(scope="module")
def folder(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("qwen3", head_dim=32)


def verl_config(folder: Path, **changed: Any) -> Any:
    """verl's configuration for its PPO trainer, whose rollout is ours; the weights come from the trainer alone."""
    import verl
    from hydra import compose, initialize_config_dir

    rollout = {
        "name": "rollout_sync",
        "tensor_model_parallel_size": 1,
        "n_gpus_per_node": 2,
        "dtype": "float32",
        "load_format": "dummy",
        "prompt_length": 64,
        "response_length": 32,
        "max_model_len": 256,
        "max_num_seqs": 64,
        "checkpoint_engine.backend": "rollout_sync",
        **changed,
    }
    overrides = [f"actor_rollout_ref.rollout.{name}={value}" for name, value in rollout.items()]
    options = "{kv_cache_bytes: 4194304, num_threads: 1}"
    overrides.append(f"+actor_rollout_ref.rollout.engine_kwargs.rollout_sync={options}")
    overrides.append(f"actor_rollout_ref.model.path={folder}")
    config_dir = os.path.join(os.path.dirname(verl.__file__), "trainer", "config")
    with initialize_config_dir(config_dir=config_dir, version_base=None):
        return compose("ppo_trainer", overrides=overrides)


def trainer_group(folder: Path, config: Any, *, hybrid: bool) -> Any:
    """Two ranks of a trainer on logical GPUs."""
    import ray
    from verl.single_controller.ray import (
        RayClassWithInitArgs,
        RayResourcePool,
        RayWorkerGroup,
    )
    from verl_trainer import TrainerWorker

    rollout_config = config.actor_rollout_ref.rollout if hybrid else None
    worker = RayClassWithInitArgs(
        ray.remote(TrainerWorker), folder=str(folder), rollout_config=rollout_config
    )
    pool = RayResourcePool(
        [2], use_gpu=True, max_colocate_count=2, name_prefix=secrets.token_hex(4)
    )
    return RayWorkerGroup(resource_pool=pool, ray_cls_with_init=worker, device_name="cuda")


async def ask(client: Any, count: int, **params: Any) -> list[Any]:
    calls = [
        client.generate(f"{i}", prompt_ids=PROMPT, sampling_params={**SAMPLED, **params})
        for i in range(count)
    ]
    return await asyncio.gather(*calls)


def check(outputs: list[Any], reference: Reference, number: int) -> None:
    """What was sampled has the trainer's own log-probabilities, and its step."""
    for output in outputs:
        expected = reference.at(number).logprobs(PROMPT, output.token_ids)
        assert output.log_probs == pytest.approx(expected, abs=TOLERANCE)
        assert output.extra_fields["global_steps"] == number


def test_two_standalone_replicas_follow_a_trainer_of_two_ranks(cluster: None, folder: Path) -> None:
    from verl.checkpoint_engine import CheckpointEngineManager
    from verl.utils.config import omega_conf_to_dataclass
    from verl.workers.rollout.llm_server import FullyAsyncLLMServerClient, LLMServerManager

    config = verl_config(folder, nnodes=1)
    servers = LLMServerManager.create(config, start_rank=2)  # hybrid ones begin at 0
    assert len(set(servers.get_addresses())) == 2
    trainer = trainer_group(folder, config, hybrid=False)
    settings = omega_conf_to_dataclass(config.actor_rollout_ref.rollout.checkpoint_engine)
    manager = CheckpointEngineManager(settings, trainer, servers.get_replicas())
    reference = Reference(folder)

    with pytest.raises(Exception, match="NoUpdateYetError"):
        asyncio.run(ask(servers.get_client(), 1))
    assert manager.update_weights(global_steps=3)["rollout_sync/version"] == 1.0
    names = list(version_weights(folder, 0))
    assert trainer.walked() == [names] * 2
    outputs = asyncio.run(ask(servers.get_client(), 16, max_tokens=12))
    assert len({tuple(output.token_ids) for output in outputs}) == 16
    check(outputs, reference, 3)

    async def update_while_generating() -> list[Any]:
        client = servers.get_client(FullyAsyncLLMServerClient)
        engines = await connected(servers.get_replicas())
        for engine in engines:
            engine.slow_down(0.05)
        before = [engine.status().num_decoded_tokens for engine in engines]
        running = asyncio.ensure_future(ask(client, 4, max_tokens=200))
        for engine, count in zip(engines, before, strict=True):
            while (await engine.async_status()).num_decoded_tokens < count + 8:
                await asyncio.sleep(0.01)
        await manager.update_weights(global_steps=4)
        for engine in engines:
            engine.slow_down(0.0)
            engine.shutdown()  # the connection
        return await running

    outputs = asyncio.run(update_while_generating())
    assert {len(output.token_ids) for output in outputs} == {200}
    assert {output.extra_fields["min_global_steps"] for output in outputs} == {3}
    assert {output.extra_fields["max_global_steps"] for output in outputs} == {4}
    assert {len(output.log_probs) for output in outputs} == {200}
    check(asyncio.run(ask(servers.get_client(), 2, max_tokens=8)), reference, 4)
    for replica in servers.get_replicas():
        asyncio.run(shut_down(replica))


async def connected(replicas: list[Any]) -> list[Engine]:
    """A client of each replica's engine; its `shutdown` ends the connection."""
    addresses = await asyncio.gather(*[replica.servers[0].address.remote() for replica in replicas])
    return [Engine.connect(address, skip_tokenizer_init=True) for address in addresses]


async def released(replicas: list[Any]) -> list[set[str]]:
    """Which memory each replica's engine has given back."""
    found = []
    for engine in await connected(replicas):
        found.append(set(engine.status().released))
        engine.shutdown()
    return found


async def shut_down(replica: Any) -> None:
    await asyncio.gather(*[server.shutdown.remote() for server in replica.servers])


def test_hybrid_replicas_sleep_and_wake_with_the_trainers_weights(
    cluster: None, folder: Path
) -> None:
    from verl.checkpoint_engine import CheckpointEngineManager
    from verl.utils.config import omega_conf_to_dataclass
    from verl.workers.rollout.llm_server import LLMServerManager

    config = verl_config(folder, **{"checkpoint_engine.backend": "naive"})
    trainer = trainer_group(folder, config, hybrid=True)
    servers = LLMServerManager.create(config, worker_group=trainer)
    settings = omega_conf_to_dataclass(config.actor_rollout_ref.rollout.checkpoint_engine)
    manager = CheckpointEngineManager(settings, trainer, servers.get_replicas())
    reference = Reference(folder)
    for step in (1, 2):
        manager.update_weights(global_steps=step)
        assert trainer.walked() == [list(version_weights(folder, 0))] * 2
        outputs = asyncio.run(ask(servers.get_client(), 16, max_tokens=12))
        assert len({tuple(output.token_ids) for output in outputs}) == 16
        check(outputs, reference, step)
        assert asyncio.run(released(servers.get_replicas())) == [set(), set()]
        manager.sleep_replicas()
        assert asyncio.run(released(servers.get_replicas())) == [{"weights", "kv_cache"}] * 2
    for replica in servers.get_replicas():
        asyncio.run(shut_down(replica))
