"""kill -9 and kill -STOP of replicas of a real pool: no request is lost, and no replica serves an old version."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from same_samples import check_same_samples
from stopped import stop

import weight_sync
from rollout import RolloutPool
from weight_sync.errors import EngineDiedError

OPTIONS = {"kv_cache_bytes": 4 << 20, "num_threads": 1, "skip_tokenizer_init": True}
LONG = {"temperature": 1.0, "max_new_tokens": 200, "ignore_eos": True, "n": 2}


@pytest.fixture(scope="module")
def pool_folder(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("qwen3", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def pool(pool_folder: Path) -> Iterator[RolloutPool]:
    with RolloutPool(
        pool_folder, num_replicas=2, health_interval_s=0.2, health_timeout_s=5.0, **OPTIONS
    ) as pool:
        yield pool


@pytest.fixture
def trainer(pool_folder: Path, pool: RolloutPool) -> Any:
    """The trainer's model, which the pool, complete again, serves when the test begins."""
    from transformers import AutoModelForCausalLM

    assert serves_again(pool)
    model = AutoModelForCausalLM.from_pretrained(pool_folder, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    pool.publish(model)
    return model


def serves_again(pool: RolloutPool, num: int = 2, timeout_s: float = 60.0) -> bool:
    """Whether `num` replicas serve before long."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if [replica.state for replica in pool.replicas()] == ["serving"] * num:
            return True
        time.sleep(0.02)
    return False


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def hurt(pool: RolloutPool, index: int, how: Callable[[int], None] = kill) -> int:
    """Do that to all processes of a replica; returns its number."""
    replica = pool.replicas()[index]
    for pid in replica.pids:
        how(pid)
    return replica.number


class Running:
    """Requests on another thread, which the replicas have when the constructor returns."""

    def __init__(self, pool: RolloutPool, num_prompts: int = 12) -> None:
        self.results: list[Any] = []
        self.error: BaseException | None = None
        prompts = [[i + 1, 2, 3] for i in range(num_prompts)]

        def run() -> None:
            try:
                self.results = pool.generate(input_ids=prompts, sampling_params=LONG)
            except BaseException as error:
                self.error = error

        self._thread = threading.Thread(target=run)
        self._thread.start()
        end = time.monotonic() + 30
        while pool.status().num_running < num_prompts and time.monotonic() < end:
            time.sleep(0.002)

    def finish(self, timeout_s: float = 60.0) -> list[Any]:
        self._thread.join(timeout_s)
        assert not self._thread.is_alive()
        if self.error is not None:
            raise self.error
        return self.results


def check_complete(results: list[Any], num_prompts: int = 12) -> None:
    """Every sample of every prompt came, whole and in order."""
    assert len(results) == num_prompts * LONG["n"]
    for result in results:
        meta = result["meta_info"]
        assert meta["finish_reason"] == {"type": "length", "length": 200}
        assert len(result["output_ids"]) == meta["weight_versions"][-1]["end"] == 200


def test_requests_of_a_killed_replica_run_again_and_its_successor_serves_the_same_version(
    pool: RolloutPool, trainer: Any
) -> None:
    running = Running(pool)
    number = hurt(pool, 0)
    results = running.finish()
    check_complete(results)
    reruns = [result["meta_info"]["num_reruns"] for result in results]
    assert set(reruns) == {0, 1} and reruns[::2] == reruns[1::2]  # Prompts move as a whole.
    assert serves_again(pool)
    assert number not in [replica.number for replica in pool.replicas()]
    assert pool.weights_fingerprint() == weight_sync.fingerprint(trainer)  # Of both, or it raises.
    check_complete(pool.generate(input_ids=[[1], [2]], sampling_params=LONG), 2)


def test_a_rerun_draws_the_same_samples(pool: RolloutPool, trainer: Any) -> None:
    params = [{**LONG, "sampling_seed": 100 * i} for i in range(12)]
    prompts = [[i + 1, 2, 3] for i in range(12)]
    expected = pool.generate(input_ids=prompts, sampling_params=params)
    got: list[Any] = []
    thread = threading.Thread(
        target=lambda: got.extend(pool.generate(input_ids=prompts, sampling_params=params))
    )
    thread.start()
    time.sleep(0.1)
    hurt(pool, 1)
    thread.join(60)
    assert any(result["meta_info"]["num_reruns"] for result in got)
    asked: dict[str, Any] = {"model": trainer, "prompts": prompts, "sampling_params": params}
    check_same_samples(got, expected, **asked)
    first, *others = got[0]["output_ids"]
    wrong = [{**got[0], "output_ids": [(first + 1) % 256, *others]}, *got[1:]]
    with pytest.raises(AssertionError):
        check_same_samples(wrong, expected, **asked)


def test_a_stream_begins_anew_on_another_replica(pool: RolloutPool, trainer: Any) -> None:
    sizes: list[int] = []
    last: dict[str, Any] = {}
    for chunk in pool.generate(input_ids=[5, 9], sampling_params={**LONG, "n": 1}, stream=True):
        last = chunk
        sizes.append(len(chunk["output_ids"]))
        if len(sizes) == 20:
            busy = [r.number for r in pool.replicas()].index(
                next(r.number for r in pool.replicas() if r.num_inflight)
            )
            hurt(pool, busy)
    assert last["meta_info"]["num_reruns"] == 1 and sizes[-1] == 200
    assert any(later < earlier for earlier, later in itertools.pairwise(sizes))


@pytest.mark.parametrize("phase", ["begun", "staged"])
def test_a_replica_that_is_killed_inside_an_update_comes_back_with_the_new_version(
    pool: RolloutPool, trainer: Any, phase: str
) -> None:
    running = Running(pool, 4)
    pool.begin_weight_update(weight_version=phase, strict=True)
    if phase == "begun":
        hurt(pool, 0)
    with torch.no_grad():
        trainer.model.norm.weight.mul_(1.5)
    pool.update_weights_from_tensor(trainer)
    if phase == "staged":
        hurt(pool, 0)
    report = pool.end_weight_update()
    assert report.complete and pool.weight_version == phase
    check_complete(running.finish(), 4)
    assert serves_again(pool)
    assert pool.weights_fingerprint() == report.fingerprint == weight_sync.fingerprint(trainer)


def test_when_all_replicas_are_killed_at_once_their_successors_get_the_version_from_the_arena(
    pool: RolloutPool, trainer: Any
) -> None:
    running = Running(pool)
    hurt(pool, 0)
    hurt(pool, 1)
    results = running.finish()
    check_complete(results)
    assert all(result["meta_info"]["num_reruns"] >= 1 for result in results)
    assert serves_again(pool)
    assert pool.weights_fingerprint() == weight_sync.fingerprint(trainer)


def test_a_replica_that_hangs_is_ended_and_replaced(pool: RolloutPool, trainer: Any) -> None:
    running = Running(pool)
    pid = pool.replicas()[0].pids[0]
    number = hurt(pool, 0, stop)
    check_complete(running.finish())
    assert serves_again(pool) and number not in [r.number for r in pool.replicas()]
    assert all_end([pid])
    assert pool.weights_fingerprint() == weight_sync.fingerprint(trainer)


def alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rsplit(")", 1)[1].split()[0] not in "ZX"


def all_end(pids: list[int], timeout_s: float = 10.0) -> bool:
    """Whether these processes end in time: a killed one goes when the system gets to it."""
    deadline = time.monotonic() + timeout_s
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(alive, pids))


def test_a_pool_that_may_not_replace_shrinks_and_says_when_nobody_is_left(
    pool_folder: Path,
) -> None:
    with RolloutPool(pool_folder, num_replicas=2, replace_dead=False, **OPTIONS) as pool:
        pids = [pid for replica in pool.replicas() for pid in replica.pids]
        running = Running(pool, 4)
        hurt(pool, 0)
        check_complete(running.finish(), 4)
        assert len(pool.replicas()) == 1
        running = Running(pool, 4)
        hurt(pool, 0)
        start = time.monotonic()
        with pytest.raises(EngineDiedError):
            running.finish()
        with pytest.raises(EngineDiedError):
            pool.generate(input_ids=[1], sampling_params=LONG)
        assert time.monotonic() - start < 5.0
    assert all_end(pids)


def test_a_shutdown_ends_what_runs_and_leaves_no_process(pool_folder: Path) -> None:
    pool = RolloutPool(pool_folder, num_replicas=1, **OPTIONS)
    pids = [pid for replica in pool.replicas() for pid in replica.pids]
    running = Running(pool, 4)
    pool.shutdown()
    results = running.finish(10.0)
    assert {r["meta_info"]["finish_reason"]["type"] for r in results} == {"abort"}
    assert all_end(pids)
    pool.shutdown()
