"""A trainer that dies while nothing is under way over its update group: the engine leaves the group by itself."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from process_group_support import group_threads, num_descriptors
from sync_support import Child, ToyEngine, collect, eventually, kill, read_line

from weight_sync.publisher.group_updates import Announced, GroupUpdates
from weight_sync.publisher.open_session import UpdateOptions

NAME = "orphans"
TESTS = Path(__file__).parent.parent
PATHS = f"import sys; sys.path[:0] = [{str(TESTS)!r}, {str(TESTS / 'sync')!r}]\n"
JOINED_ONLY = (
    PATHS
    + """
from sync_support import weights
from weight_sync import WeightPublisher
from weight_sync.publisher.endpoint import EngineEndpoint

def stop(*arguments):
    print("joined", flush=True)
    sys.stdin.read()

EngineEndpoint._open = stop
WeightPublisher(sys.argv[1], transport="process_group", group_backend="gloo").publish(weights(1.0))
"""
)
PLAIN = (
    PATHS
    + """
import torch
from plain_group import PlainGroup

group = PlainGroup.serve(world_size=2, group_name=sys.argv[1], timeout_s=60)
print(group.master_port, flush=True)
group.joined.result()
for line in sys.stdin:
    group.broadcast(torch.zeros(14, dtype=torch.uint8), [(0, 14)], timeout_s=60).result()
    print("sent", flush=True)
"""
)


def receives(process: psutil.Process) -> bool:
    """Whether it is a living member of a group in place of this process: a child of what those are forked from."""
    try:
        parent = process.parent()
        apart = parent is not None and parent.pid != os.getpid()
        return apart and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


@pytest.fixture
def start() -> Iterator[Callable[..., Child]]:
    started: list[Child] = []

    def start(program: str, *arguments: str) -> Child:
        started.append(Child("-c", program, *arguments))
        return started[-1]

    yield start
    for process in started:
        collect(process)


def test_one_that_dies_between_joining_and_its_arena_leaves_no_group(
    make_engine: Callable[..., ToyEngine], start: Callable[..., Child]
) -> None:
    engine = make_engine(serve=True)
    trainer = start(JOINED_ONLY, engine.address)
    before = group_threads(), num_descriptors()
    assert read_line(trainer) == "joined"
    assert len(engine.service._groups) == 1 and num_descriptors() > before[1]
    kill(trainer)
    assert eventually(lambda: len(engine.service._groups) == 0)
    assert eventually(lambda: group_threads() <= before[0] and num_descriptors() <= before[1])


def test_a_plain_one_leaves_no_process_and_no_memory_of_a_stage_and_its_group_can_be_left(
    make_engine: Callable[..., ToyEngine], start: Callable[..., Child]
) -> None:
    engine = make_engine()
    engine.host.look_away()
    updates = GroupUpdates(engine, timeout_s=60)
    memory = engine.receiver.stages.extra

    def update_and_die() -> None:
        trainer = start(PLAIN, NAME)
        port = int(read_line(trainer))
        updates.join(
            group_name=NAME,
            master_address="127.0.0.1",
            master_port=port,
            rank_offset=1,
            world_size=2,
            backend="gloo",
        )
        assert trainer.stdin is not None
        print("send", file=trainer.stdin, flush=True)
        announced = Announced(
            names=["norm.weight"], dtypes=["bfloat16"], shapes=[[7]], layout="tensors"
        )
        with updates.taking(NAME) as taking:
            taking.update(UpdateOptions(strict=False), announced)
        assert read_line(trainer) == "sent" and memory.num_bytes > 0
        assert any(map(receives, psutil.Process().children(recursive=True)))
        kill(trainer)

    update_and_die()
    assert eventually(lambda: memory.num_bytes == 0 and not engine.receiver._arenas)
    assert eventually(lambda: not any(map(receives, psutil.Process().children(recursive=True))))
    assert not group_threads()
    update_and_die()  # a new one takes the place of the old one
    assert eventually(lambda: memory.num_bytes == 0)
    updates.leave(NAME)
    assert len(engine.service._groups) == 0
    updates.close()
