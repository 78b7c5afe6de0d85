"""Engines, actors and pools on a Ray cluster of two nodes, all on this machine."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ray_cluster import free_cpus, ray_cluster

import weight_sync
from rollout import Engine, RolloutActor, RolloutPool
from rollout.errors import ConfigError, UnauthorizedError
from weight_sync.errors import AddressInUseError, EngineDiedError, TornWeightsError
from weight_sync.publisher.publisher import WeightPublisher
from weight_sync.wire.keys import shown

PROMPTS = [[5, 9, 2], [7] * 40, list(range(20, 53))]
GREEDY = {"temperature": 0.0, "max_new_tokens": 8, "ignore_eos": True}
OPTIONS = {"kv_cache_bytes": 4 << 20, "num_threads": 1, "skip_tokenizer_init": True}
CPUS_PER_NODE = 3


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes, connected."""
    with ray_cluster(num_nodes=2, cpus_per_node=CPUS_PER_NODE) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def folder(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("qwen3", tie_word_embeddings=True)


@pytest.fixture
def trainer(folder: Path) -> Any:
    """The trainer's model after a step."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    return model


def check_parity(generate: Callable[..., Any], model: Any) -> None:
    """Greedy tokens and log-probabilities are those of the trainer's model."""
    results = generate(input_ids=PROMPTS, sampling_params=GREEDY, return_logprob=True)
    for prompt, result in zip(PROMPTS, results, strict=True):
        ids = prompt + result["output_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, len(prompt) - 1 : -1].float()
        rows = torch.log_softmax(logits, -1)
        assert rows.argmax(-1).tolist() == result["output_ids"]
        got = [value for value, _, _ in result["meta_info"]["output_token_logprobs"]]
        assert got == pytest.approx(rows.max(-1).values.tolist(), abs=1e-4)


def gone(pids: list[int], timeout_s: float = 10.0) -> bool:
    """Whether all these processes end before long."""
    end = time.monotonic() + timeout_s
    while any(os.path.exists(f"/proc/{pid}") for pid in pids):
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def test_an_engine_of_two_ranks_is_packed_on_a_node_and_dies_as_a_whole(
    cluster: Any, folder: Path, trainer: Any, reference_model: Callable[[Path], Any]
) -> None:
    with Engine(folder, executor="ray", tp_size=2, **OPTIONS) as engine:
        executor: Any = engine._executor
        assert len({place.node_id for place in executor._places}) == 1
        assert len(set(executor.pids)) == 2 and engine.status().pid == executor.pids[0]
        assert engine.address.startswith("tcp://127.0.0.1:")
        check_parity(engine.generate, reference_model(folder))
        report = engine.update_weights_from_tensor(trainer, weight_version="one")
        assert report.transport == "shared_memory"
        later = engine.generate(
            input_ids=[1, 2], sampling_params=GREEDY, min_weight_version=report.version
        )
        assert later["meta_info"]["weight_version"] == "one"
        assert engine.weights_fingerprint() == weight_sync.fingerprint(trainer)
        check_parity(engine.generate, trainer)

        failure: list[BaseException] = []

        def generate() -> None:
            long = {"max_new_tokens": 400, "ignore_eos": True, "n": 8}
            try:
                engine.generate(input_ids=[[i, 1] for i in range(32)], sampling_params=long)
            except BaseException as error:
                failure.append(error)

        thread = threading.Thread(target=generate)
        thread.start()
        while engine.status().num_running == 0:
            time.sleep(0.01)
        start = time.monotonic()
        os.kill(executor.pids[1], signal.SIGKILL)
        thread.join(30)
        assert isinstance(failure[0], EngineDiedError) and time.monotonic() - start < 25.0
        assert gone(executor.pids)
        with pytest.raises(EngineDiedError):
            engine.generate(input_ids=[1])
    assert free_cpus(2 * CPUS_PER_NODE)


def test_a_cluster_without_room_is_an_error_that_says_what_there_is(
    cluster: Any, folder: Path
) -> None:
    with pytest.raises(ConfigError, match=r"no room for 2 processes.*'CPU': 3.0"):
        Engine(folder, executor="ray", tp_size=2, ray_num_cpus=2, start_timeout_s=0.5, **OPTIONS)
    with pytest.raises(ConfigError, match="'nobody', expected the name of a placement group"):
        Engine(folder, executor="ray", ray_placement_group="nobody", **OPTIONS)
    with pytest.raises(ConfigError, match="model_path"):
        Engine(folder / "nothing", executor="ray", **OPTIONS)
    assert free_cpus(2 * CPUS_PER_NODE)


def test_an_engine_lives_in_a_bundle_of_the_callers(
    cluster: Any, folder: Path, trainer: Any
) -> None:
    import ray

    bundles = [{"CPU": 1.0}] * 2
    group = ray.util.placement_group(bundles, strategy="STRICT_PACK", name="trainer-and-engine")
    assert group.wait(10)
    options = {**OPTIONS, "ray_placement_group": "trainer-and-engine"}
    with pytest.raises(ConfigError, match="from number 2 on"):
        Engine(folder, executor="ray", ray_first_bundle=2, **options)
    with Engine(folder, executor="ray", ray_first_bundle=1, **options) as engine:
        table = ray.util.placement_group_table(group)
        executor: Any = engine._executor
        assert executor.node_id == table["bundles_to_node_id"][1]
        engine.update_weights_from_tensor(trainer)
        check_parity(engine.generate, trainer)
    assert gone(executor.pids)
    assert ray.util.placement_group_table(group)["state"] == "CREATED"  # Not ours to remove.
    ray.util.remove_placement_group(group)
    assert free_cpus(2 * CPUS_PER_NODE)


def test_an_actor_serves_many_calls_at_once_and_takes_weights_at_its_address(
    cluster: Any, folder: Path, trainer: Any
) -> None:
    import ray

    actor = RolloutActor.options(num_cpus=1, name="rollouts").remote(str(folder), **OPTIONS)
    long = {"max_new_tokens": 300, "ignore_eos": True, "temperature": 0.0}
    running = actor.generate.remote(input_ids=[1, 2], sampling_params=long)
    early = actor.generate.remote(
        input_ids=[1, 2], sampling_params=GREEDY, min_weight_version=1, timeout_s=60.0
    )
    with WeightPublisher(ray.get(actor.address.remote(), timeout=60)) as publisher:
        report = publisher.publish(trainer, label="in an actor")
    assert ray.get(actor.get_weight_version.remote(), timeout=30) == "in an actor"
    assert ray.get(actor.weights_fingerprint.remote(), timeout=30) == report.fingerprint
    check_parity(
        lambda **arguments: ray.get(actor.generate.remote(**arguments), timeout=30), trainer
    )
    spans = ray.get(running, timeout=60)["meta_info"]["weight_versions"]
    assert spans[-1]["end"] == 300
    [span] = ray.get(early, timeout=60)["meta_info"]["weight_versions"]
    assert (span["version"], span["number"]) == ("in an actor", 1)
    stream = actor.generate_stream.remote(input_ids=[1, 2], sampling_params=GREEDY)
    sizes = [len(ray.get(chunk)["output_ids"]) for chunk in stream]
    assert sizes == sorted(sizes) and sizes[-1] == 8
    with pytest.raises(ValueError, match="temperature"):
        ray.get(actor.generate.remote(input_ids=[1], sampling_params={"temprature": 1}))
    result = ray.get(actor.encode.remote(input_ids=[1, 2]), timeout=30)
    state = trainer.model(torch.tensor([[1, 2]])).last_hidden_state[0, -1]
    assert result["embedding"] == pytest.approx(state.tolist(), abs=1e-4)
    pid = ray.get(actor.status.remote()).pid
    ray.kill(actor)
    assert gone([pid])


def check_guarded(address: str, trainer: Any) -> None:
    """Its key opens it, and nothing else does."""
    assert "?key=" in address
    with pytest.raises(UnauthorizedError):
        WeightPublisher(shown(address)).publish(trainer)
    with WeightPublisher(address) as publisher:
        publisher.publish(trainer, label="with the key")


def test_an_actor_and_an_engine_that_listen_beyond_their_machine_take_weights_with_their_key_alone(
    cluster: Any, folder: Path, trainer: Any
) -> None:
    import ray

    options = {**OPTIONS, "listen": "tcp://0.0.0.0:0"}
    actor = RolloutActor.options(num_cpus=1).remote(str(folder), **options)
    check_guarded(ray.get(actor.address.remote(), timeout=60), trainer)
    assert ray.get(actor.get_weight_version.remote(), timeout=30) == "with the key"
    ray.kill(actor)
    with Engine(folder, executor="ray", **options) as engine:
        check_guarded(engine.address, trainer)
        assert engine.weight_version == "with the key"
        check_parity(engine.generate, trainer)


def came_back(actor: Any, timeout_s: float = 60.0) -> bool:
    """Whether Ray has it running again before long."""
    import ray

    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        try:
            return bool(ray.get(actor.address.remote(), timeout=timeout_s))
        except ray.exceptions.RayActorError:
            time.sleep(0.1)
    return False


def test_an_actor_that_ray_restarts_generates_nothing_until_it_has_been_updated(
    cluster: Any, folder: Path, trainer: Any
) -> None:
    import ray

    actor = RolloutActor.options(num_cpus=1, max_restarts=1).remote(str(folder), **OPTIONS)
    for restarted in (False, True):
        if restarted:
            assert came_back(actor)
            with pytest.raises(TornWeightsError, match=r"restarted this actor.*new address"):
                ray.get(actor.generate.remote(input_ids=[1], sampling_params=GREEDY), timeout=60)
            with pytest.raises(TornWeightsError, match="restarted this actor"):
                stream = actor.generate_stream.remote(input_ids=[1], sampling_params=GREEDY)
                ray.get(next(iter(stream)))
        with WeightPublisher(ray.get(actor.address.remote(), timeout=60)) as publisher:
            publisher.publish(trainer, label="step 17")
        check_parity(
            lambda **arguments: ray.get(actor.generate.remote(**arguments), timeout=30), trainer
        )
        pid = ray.get(actor.status.remote()).pid
        ray.kill(actor, no_restart=restarted)
        assert gone([pid])


def test_what_only_the_actors_machine_can_see_is_an_error_of_its_own_type(
    cluster: Any, folder: Path
) -> None:
    import ray

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        actor = RolloutActor.options(num_cpus=1).remote(str(folder), listen=address, **OPTIONS)
        for method in (actor.address, actor.status, actor.weights_fingerprint):
            with pytest.raises(AddressInUseError, match="did not start: cannot listen") as caught:
                ray.get(method.remote(), timeout=60)
            assert len(str(caught.value).splitlines()) < 20
    ray.kill(actor)
    assert free_cpus(2 * CPUS_PER_NODE)


DRIVER = """
import sys, ray
from rollout import Engine
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
options = dict(kv_cache_bytes=4 << 20, num_threads=1, skip_tokenizer_init=True)
engine = Engine(sys.argv[2], executor="ray", **options)
print(*engine._executor.pids, flush=True)
sys.stdin.read()
"""


def test_when_the_driver_is_killed_its_ranks_end(
    cluster: Any, folder: Path, tmp_path: Path
) -> None:
    """The driver runs in another folder, and its workers import the package all the same."""
    command = [sys.executable, "-c", DRIVER, cluster.address, str(folder)]
    driver = subprocess.Popen(
        command, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with driver:
        assert driver.stdout is not None
        pids = [int(pid) for pid in driver.stdout.readline().split()]
        assert pids and all(os.path.exists(f"/proc/{pid}") for pid in pids)
        driver.kill()
    assert gone(pids, 20.0) and free_cpus(2 * CPUS_PER_NODE)


def test_the_example_of_an_actor_runs_on_a_cluster_that_is_there(
    cluster: Any, folder: Path
) -> None:
    result = subprocess.run(
        [sys.executable, "examples/ray_actor.py", str(folder)],
        env={**os.environ, "RAY_ADDRESS": cluster.address},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    for words in ("'step 1'", "16 samples from 4 calls at once", "bit for bit"):
        assert words in result.stdout, result.stdout


def serving(pool: RolloutPool, where: Callable[[Any], bool] = lambda replica: True) -> list[Any]:
    """The replicas, once two of them serve, as they should be, and no other is there."""
    end = time.monotonic() + 60.0
    while time.monotonic() < end:
        replicas = pool.replicas()
        if [r.state == "serving" and where(r) for r in replicas] == [True, True]:
            return replicas
        time.sleep(0.05)
    raise AssertionError(pool.replicas())


def test_a_pool_spreads_its_replicas_and_replaces_what_dies(
    cluster: Any, folder: Path, trainer: Any
) -> None:
    with RolloutPool(folder, num_replicas=2, executor="ray", **OPTIONS) as pool:
        before = pool.replicas()
        assert len({replica.node_id for replica in before}) == 2
        report = pool.publish(trainer, label="spread")
        check_parity(pool.generate, trainer)
        results: list[Any] = []
        params = {"max_new_tokens": 250, "ignore_eos": True, "n": 2}

        def generate() -> None:
            prompts = [[i + 1, 2] for i in range(16)]
            results.extend(pool.generate(input_ids=prompts, sampling_params=params))

        thread = threading.Thread(target=generate)
        thread.start()
        while pool.status().num_running < 16:
            time.sleep(0.005)
        os.kill(before[0].pids[0], signal.SIGKILL)
        thread.join(90)
        assert [len(result["output_ids"]) for result in results] == [250] * 32
        assert {result["meta_info"]["num_reruns"] for result in results} == {0, 1}
        after = serving(pool)
        assert {replica.node_id for replica in after} == {replica.node_id for replica in before}
        assert pool.weights_fingerprint() == report.fingerprint == weight_sync.fingerprint(trainer)

        cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
        head = cluster.head_node.node_id
        left = serving(pool, lambda replica: replica.node_id == head)
        assert pool.weights_fingerprint() == report.fingerprint
        assert len(pool.generate(input_ids=PROMPTS, sampling_params=GREEDY)) == len(PROMPTS)
    assert gone([pid for replica in left for pid in replica.pids])
    assert free_cpus(CPUS_PER_NODE)
