"""An arena that an engine opens too late for whoever asked, or for a trainer that has died since, does not stay."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from ipc_stand_in import stand_in
from sync_support import ToyEngine, eventually, kill, read_line, weights

from weight_sync import DeadlineExceeded, WeightPublisher
from weight_sync.joint.service import JointChannel
from weight_sync.receiver.local_channel import LocalChannel
from weight_sync.receiver.ranked_service import RankedService
from weight_sync.staging import opened_cuda_ipc
from weight_sync.staging.opened_cuda_ipc import OpenedCudaIpcArena
from weight_sync.staging.shadow_stage import StageMemory
from weight_sync.transports.shared_memory import SharedMemoryArena
from weight_sync.wire.messages import OpenArena, WeightRequest
from weight_sync.wire.rpc import RpcServer


class Ranks:
    """Two engines that a front takes for two ranks of one."""

    def __init__(self, make_engine: Callable[..., ToyEngine]) -> None:
        self.engines = [make_engine(), make_engine()]
        self.front = RankedService([LocalChannel(toy.service) for toy in self.engines])
        self.channel = JointChannel(self.front)

    @property
    def num_arenas(self) -> list[int]:
        return [len(toy.receiver._arenas) for toy in self.engines]


@pytest.fixture
def ranks(make_engine: Callable[..., ToyEngine]) -> Any:
    ranks = Ranks(make_engine)
    yield ranks
    ranks.front.close()


@pytest.fixture
def slow_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory for a stage, which for large models takes seconds, comes later than the publisher waits."""
    existing = StageMemory._existing_shadow

    def slowly(memory: StageMemory) -> Any:
        if memory._shadow is None:
            time.sleep(2.0)
        return existing(memory)

    monkeypatch.setattr(StageMemory, "_existing_shadow", slowly)


def test_memory_of_a_stage_that_came_too_late_goes_back_and_the_next_update_has_its_own(
    make_engine: Callable[..., ToyEngine], slow_stage: None
) -> None:
    engine = make_engine(serve=True)
    memory = engine.receiver.stages.extra
    options: dict[str, Any] = {"transport": "process_group", "group_backend": "gloo"}
    with WeightPublisher(engine.address, timeout_s=1.0, **options) as publisher:
        with pytest.raises(DeadlineExceeded, match="OpenArena"):
            publisher.publish(weights(1.0))
        assert eventually(lambda: not engine.service._groups._groups), "it has left the group"
        assert eventually(lambda: not engine.receiver._arenas) and memory.num_bytes == 0
        publisher.publish(weights(2.0), timeout_s=60.0)
        assert engine.values() == {2.0} and memory.num_bytes > 0
    assert eventually(lambda: not engine.receiver._arenas) and memory.num_bytes == 0


@pytest.mark.parametrize("closes", [False, True])
def test_an_arena_on_a_gpu_whose_opening_is_told_too_late_is_closed_before_its_memory_goes(
    make_engine: Callable[..., ToyEngine], monkeypatch: pytest.MonkeyPatch, closes: bool
) -> None:
    """Else an engine would hold it, and a stage for it, for as long as the trainer lives."""
    memory = stand_in(monkeypatch)
    monkeypatch.setattr(opened_cuda_ipc, "_check_owner", lambda handle: None)  # both are here
    engine = make_engine(serve=True)
    add, let_go = engine.receiver.add_arena, OpenedCudaIpcArena.close
    kept: list[int] = []

    def late(arena: Any) -> int:
        time.sleep(1.5)
        return add(arena)

    def noted(self: Any) -> None:
        kept.append(len(memory._files))
        let_go(self)

    monkeypatch.setattr(engine.receiver, "add_arena", late)
    monkeypatch.setattr(OpenedCudaIpcArena, "close", noted)
    options: dict[str, Any] = {"transport": "cuda_ipc", "arena_bytes": 2048, "timeout_s": 1.0}
    publisher = WeightPublisher(engine.address, **options)
    with pytest.raises(DeadlineExceeded, match="OpenArena"):
        publisher.publish(weights(1.0))
    if closes:
        publisher.close()
    assert eventually(lambda: kept == [1]), (
        "the engine has let go of it, and it was there until then"
    )
    assert eventually(lambda: not memory._files and not engine.receiver._arenas)
    assert engine.receiver.stages.extra.num_bytes == 0
    publisher.close()


def test_an_arena_over_a_group_that_was_left_is_closed(
    make_engine: Callable[..., ToyEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer was lost on its way: the publisher leaves its group, and does not know what the arena is called."""
    engine = make_engine(serve=True)
    options: dict[str, Any] = {"transport": "process_group", "group_backend": "gloo"}
    with WeightPublisher(engine.address, **options) as publisher:
        endpoint = publisher._endpoint
        opened = type(endpoint)._open

        def unheard(*arguments: Any) -> Any:
            opened(endpoint, *arguments)
            raise DeadlineExceeded("no answer")

        with monkeypatch.context() as patched:
            patched.setattr(endpoint, "_open", unheard)
            with pytest.raises(DeadlineExceeded, match="no answer"):
                publisher.publish(weights(1.0))
        assert eventually(lambda: not engine.receiver._arenas)
        assert engine.receiver.stages.extra.num_bytes == 0


def test_a_rank_that_opens_an_arena_later_than_the_others_closes_it(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = ranks.engines[1].service
    opened = slow._open

    def slowly(*arguments: Any) -> Any:
        time.sleep(1.0)
        return opened(*arguments)

    arena = SharedMemoryArena(1 << 16)
    with monkeypatch.context() as patched:
        patched.setattr(slow, "_open", slowly)
        with pytest.raises(DeadlineExceeded):
            ranks.channel.call(OpenArena(handle=arena.handle), 0.3)
        time.sleep(1.0)
    # What comes next in each rank's order comes after the late one was closed.
    assert eventually(lambda: ranks.num_arenas == [0, 0])
    ranks.channel.call(OpenArena(handle=arena.handle), 60.0)
    assert ranks.num_arenas == [1, 1]
    arena.close()


def test_the_front_of_several_ranks_forgets_the_arenas_of_dead_trainers(
    ranks: Ranks, child: Callable[..., Any]
) -> None:
    server = RpcServer(ranks.front.handle, WeightRequest)
    server.start()
    try:
        trainer = child("trainer_process.py", server.address, "begin")
        assert read_line(trainer) == "ready"
        assert ranks.num_arenas == [1, 1] and len(ranks.front._arenas._opened) == 1
        kill(trainer)
        assert eventually(lambda: ranks.num_arenas == [0, 0])
        arena = SharedMemoryArena(1 << 16)
        ranks.channel.call(OpenArena(handle=arena.handle), 60.0)
        assert len(ranks.front._arenas._opened) == 1
        assert [len(member.arenas) for member in ranks.front._members] == [1, 1]
        arena.close()
    finally:
        server.close()
