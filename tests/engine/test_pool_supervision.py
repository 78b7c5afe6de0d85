"""How a pool keeps its replicas alive, with engines on threads of this process that can be made to die."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

from rollout.config import EngineConfig
from rollout.engine.executors.executor import InlineExecutor
from rollout.errors import CheckpointError, InvalidRequestError
from rollout.pool import supervisor
from rollout.pool.config import PoolConfig
from rollout.pool.executor import PoolExecutor
from rollout.protocol.commands import (
    AbortRequests,
    Generate,
    GetStatus,
    PauseGeneration,
    PromptSpec,
    ReleaseMemory,
    ResumeMemory,
    Status,
)
from rollout.sampling_params import SamplingParams
from weight_sync import EngineDiedError, WeightPublisher
from weight_sync.errors import DeadlineExceeded, TornWeightsError


class Mortal(InlineExecutor):
    """An engine that can die, hang, or be unable to write."""

    def __init__(self, config: EngineConfig, slot: int, born: list[Mortal]) -> None:
        super().__init__(config)
        self.slot = slot
        self.dead: str | None = None
        self.hangs = False
        born.append(self)

    def submit(self, body: Any, *, timeout_s: float, on_chunk: Any = None) -> Future[Any]:
        if self.dead is not None:
            return failed(EngineDiedError(self.dead))
        if self.hangs:
            return failed(DeadlineExceeded(f"no answer within {timeout_s} s"))
        return super().submit(body, timeout_s=timeout_s, on_chunk=on_chunk)

    def weight_channel(self) -> MortalChannel:
        return MortalChannel(self, super().weight_channel())

    def kill(self) -> None:
        self.dead = self.dead or "killed"
        self.hangs = False
        self._closing()

    def close(self) -> None:
        self._closing()

    def _closing(self) -> None:
        dead, self.dead = self.dead, None
        super().close()
        self.dead = dead or "closed"


class MortalChannel:
    """To a `Mortal`, as long as it lives."""

    is_local = False

    def __init__(self, engine: Mortal, channel: Any) -> None:
        self._engine = engine
        self._channel = channel

    def submit(self, message: Any, timeout_s: float) -> Future[Any]:
        if self._engine.dead is not None:
            return failed(EngineDiedError(self._engine.dead))
        return self._channel.submit(message, timeout_s)

    def call(self, message: Any, timeout_s: float) -> Any:
        return self.submit(message, timeout_s).result(timeout_s)

    def lend(self, buffer: torch.Tensor) -> str:
        raise AssertionError

    @property
    def dead(self) -> str | None:
        return self._engine.dead

    def close(self) -> None:
        """Not ours."""


def failed(error: Exception) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_exception(error)
    return future


class Nursery:
    """Makes pools of `Mortal` engines, and decides which starts fail."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.born: list[Mortal] = []
        self.slots: list[int] = []
        self.failures: list[Exception] = []
        self._pools: list[PoolExecutor] = []

    def make_executor(self, slot: int) -> Mortal:
        self.slots.append(slot)
        if self.failures:
            raise self.failures.pop(0)
        return Mortal(self.config, slot, self.born)

    def pool(self, **options: Any) -> PoolExecutor:
        options = {"num_replicas": 2, "health_interval_s": 0.05, **options}
        self._pools.append(PoolExecutor(self.config, PoolConfig(**options), self.make_executor))
        return self._pools[-1]

    def close(self) -> None:
        for pool in self._pools:
            pool.close()
        for engine in self.born:
            engine.close()


@pytest.fixture
def nursery(
    tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Nursery]:
    monkeypatch.setattr(supervisor, "_LONGEST_BACKOFF_S", 0.05)
    folder = tiny_checkpoint("qwen3", tie_word_embeddings=True)
    config = EngineConfig(model_path=str(folder), kv_cache_bytes=1 << 20, skip_tokenizer_init=True)
    nursery = Nursery(config)
    yield nursery
    nursery.close()


def states(pool: PoolExecutor) -> list[tuple[int, str]]:
    return [(status.number, status.state) for status in pool.replica_statuses()]


def becomes(pool: PoolExecutor, expected: list[tuple[int, str]], timeout_s: float = 20.0) -> bool:
    end = time.monotonic() + timeout_s
    while states(pool) != expected and time.monotonic() < end:
        time.sleep(0.01)
    return states(pool) == expected


def weights(nursery: Nursery, scale: float) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(nursery.config.model_path, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    return model


def test_a_replica_that_dies_unasked_is_noticed_and_its_slot_is_used_again(
    nursery: Nursery,
) -> None:
    pool = nursery.pool()
    assert sorted(nursery.slots) == [0, 1] and states(pool) == [(0, "serving"), (1, "serving")]
    victim, other = nursery.born
    victim.dead = "killed"
    survivor = pool._supervisor.replicas
    kept = next(number for number, replica in survivor.items() if replica.executor is other)
    assert becomes(pool, [(kept, "serving"), (2, "serving")])
    assert len(nursery.slots) == 3 and nursery.slots[2] == victim.slot


def test_a_replica_that_does_not_answer_is_ended_and_replaced(nursery: Nursery) -> None:
    pool = nursery.pool()
    nursery.born[1].hangs = True
    assert becomes(pool, [(0, "serving"), (2, "serving")]) or becomes(
        pool, [(1, "serving"), (2, "serving")], 0.1
    )
    assert nursery.born[1].dead == "killed"


def test_the_first_start_that_fails_fails_the_pool_and_leaves_nothing(nursery: Nursery) -> None:
    nursery.failures = [CheckpointError("no weights")]
    with pytest.raises(CheckpointError, match="no weights"):
        nursery.pool()
    end = time.monotonic() + 10
    while any(engine.dead is None for engine in nursery.born) and time.monotonic() < end:
        time.sleep(0.01)
    assert all(engine.dead is not None for engine in nursery.born)


def test_a_replacement_that_does_not_start_is_tried_again(nursery: Nursery) -> None:
    pool = nursery.pool(num_replicas=1, max_start_failures=3)
    for number in (1, 2):  # Failures in a row count, not those of the pool's whole life.
        nursery.failures = [RuntimeError("no room"), RuntimeError("no room")]
        nursery.born[-1].dead = "killed"
        assert becomes(pool, [(number, "serving")])
    assert len(nursery.slots) == 1 + 3 + 3


def test_after_too_many_failed_starts_the_pool_goes_on_without_and_then_says_why(
    nursery: Nursery,
) -> None:
    pool = nursery.pool(max_start_failures=2)
    nursery.failures = [RuntimeError("no room")] * 99
    nursery.born[0].dead = "killed"
    assert becomes(pool, [(1, "serving")])
    time.sleep(0.3)
    assert len(nursery.slots) == 4
    nursery.born[1].dead = "killed"
    end = time.monotonic() + 10
    while len(nursery.slots) < 5 and time.monotonic() < end:
        time.sleep(0.01)
    with pytest.raises(EngineDiedError):
        pool.submit(GetStatus(), timeout_s=60).result(60)


def test_a_replica_more_that_does_not_start_is_the_callers_error(nursery: Nursery) -> None:
    pool = nursery.pool(num_replicas=1)
    nursery.failures = [CheckpointError("gone")] * 9
    with pytest.raises(CheckpointError, match="gone"):
        pool.add_replica()
    assert states(pool) == [(0, "serving")]


def test_a_replica_that_comes_while_generation_is_paused_is_paused_too(nursery: Nursery) -> None:
    pool = nursery.pool(num_replicas=1)
    pool.submit(PauseGeneration(mode="in_place", lease_s=60), timeout_s=60).result(60)
    pool.add_replica()
    for engine in nursery.born:
        status: Status = engine.submit(GetStatus(), timeout_s=60).result(60)
        assert status.paused == "in_place"


@pytest.mark.parametrize("dies", [False, True], ids=["one more", "a replacement"])
def test_a_replica_that_comes_while_memory_is_released_gives_its_own_back(
    nursery: Nursery, dies: bool
) -> None:
    pool = nursery.pool(num_replicas=2)
    pool.submit(ReleaseMemory(tags=["weights", "kv_cache"]), timeout_s=60).result(60)
    if dies:
        nursery.born[0].dead = "killed"
    else:
        with pytest.raises(TornWeightsError):  # It is there, and has nothing to serve.
            pool.add_replica()
    assert eventually(lambda: len(nursery.born) == 3 and released(nursery.born[2]) == BOTH)
    pool.submit(ResumeMemory(tags=["weights"]), timeout_s=60).result(60)
    assert released(nursery.born[2]) == ["kv_cache"]
    pool.submit(ResumeMemory(tags=["kv_cache"]), timeout_s=60).result(60)
    with WeightPublisher(pool) as publisher:
        report = publisher.publish(weights(nursery, 1.5))
        assert publisher.fingerprint() == report.fingerprint
    assert {state for _, state in states(pool)} == {"serving"}
    assert nursery.born[2]._core.receiver.version == 1


BOTH = ["kv_cache", "weights"]


def released(engine: Mortal) -> list[str]:
    status: Status = engine.submit(GetStatus(), timeout_s=60).result(60)
    return list(status.released)


def eventually(condition: Callable[[], bool], timeout_s: float = 20.0) -> bool:
    end = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def test_a_replica_that_cannot_write_catches_up_by_itself(
    nursery: Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = nursery.pool()
    core = nursery.born[0]._core
    original, broken = core.host.between_steps, [True]

    def between_steps(action: Any, timeout_s: float, name: str | None = None) -> Any:
        if broken:
            broken.clear()
            raise RuntimeError("broke on purpose")
        return original(action, timeout_s, name)

    monkeypatch.setattr(core.host, "between_steps", between_steps)
    with WeightPublisher(pool) as publisher:
        report = publisher.publish(weights(nursery, 1.5))
        assert not broken and report.version == 1
        assert becomes(pool, [(0, "serving"), (1, "serving")])
        assert publisher.fingerprint() == report.fingerprint  # Of both, or it raises.
    assert [engine._core.receiver.version for engine in nursery.born] == [1, 1]


def test_when_everything_is_lost_the_pool_says_so_until_a_complete_update(
    nursery: Nursery,
) -> None:
    pool = nursery.pool(num_replicas=1)
    with WeightPublisher(pool) as publisher:
        publisher.publish(weights(nursery, 1.5))
    nursery.born[0].dead = "killed"  # And the publisher's arena is closed.
    assert becomes(pool, [(1, "behind")])
    prompt = PromptSpec(rid="a", input_ids=[1], params=SamplingParams(max_new_tokens=2))
    with pytest.raises(TornWeightsError, match="complete update"):
        pool.submit(Generate(prompts=[prompt]), timeout_s=10).result(10)
    with WeightPublisher(pool) as publisher:
        assert publisher.publish(weights(nursery, 2.0)).version == 2
    assert becomes(pool, [(1, "serving")])
    assert pool.submit(Generate(prompts=[prompt]), timeout_s=10).result(10).count == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"rid": "\ud800"},
        {"rid": "ok", "input_ids": [1 << 70]},
        {"rid": "ok", "input_ids": [1] * 9000},
    ],
    ids=["half a surrogate pair", "a number over 64 bits", "over the limit of a message"],
)
def test_what_cannot_be_sent_is_refused_before_it_counts(
    nursery: Nursery, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    monkeypatch.setattr("weight_sync.wire.messages.MAX_MESSAGE_BYTES", 12_000)
    pool = nursery.pool(num_replicas=1, max_inflight_samples=1)
    fields = {"input_ids": [1], "params": SamplingParams(max_new_tokens=2), **changes}
    for _ in range(2):
        with pytest.raises(InvalidRequestError, match="cannot be sent"):
            pool.submit(Generate(prompts=[PromptSpec(**fields)]), timeout_s=60).result(60)
    with pytest.raises(InvalidRequestError, match="at most a week"):
        pool.submit(GetStatus(), timeout_s=8 * 86_400)
    with pytest.raises(InvalidRequestError, match="cannot be sent"):
        pool.submit(AbortRequests(rids=["\ud800"]), timeout_s=60)
    good = PromptSpec(rid="good", input_ids=[1], params=SamplingParams(max_new_tokens=2))
    assert pool.submit(Generate(prompts=[good]), timeout_s=10).result(10).count == 1
    assert pool.replica_statuses()[0].num_inflight == 0
