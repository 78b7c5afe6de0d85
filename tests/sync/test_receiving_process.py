"""The processes that are members of plain trainers' groups in the engine's place: lost, orphaned, out of memory."""

from __future__ import annotations

import os
import resource
import signal
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import psutil
import pytest
import torch
from many_descriptors import many_descriptors
from plain_group import PlainGroup
from process_group_peer import content
from process_group_support import NAME, PeerPool, num_descriptors
from sync_support import eventually

from weight_sync.errors import TransportError
from weight_sync.process_groups.last_reads import read_away
from weight_sync.process_groups.receiving_process import ReceivingProcesses
from weight_sync.staging.joined_group import JoinedGroup

MIB = 1 << 20


@pytest.fixture(scope="module")
def processes() -> Iterator[ReceivingProcesses]:
    processes = ReceivingProcesses()
    yield processes
    processes.close()


@pytest.fixture
def connect(processes: ReceivingProcesses) -> Iterator[Callable[[], Any]]:
    groups: list[JoinedGroup] = []

    def make(processes: ReceivingProcesses = processes) -> tuple[PlainGroup, JoinedGroup]:
        trainer = PlainGroup.serve(world_size=2, group_name=NAME, timeout_s=60)
        engine = JoinedGroup.join(
            master_address="127.0.0.1",
            master_port=trainer.master_port,
            rank=1,
            world_size=2,
            group_name=NAME,
            timeout_s=60,
            processes=processes,
        )
        groups.extend([engine, trainer])
        for group in (trainer, engine):
            group.joined.result(60)
        return trainer, engine

    yield make
    for group in groups:
        group.destroy()


@contextmanager
def started_late() -> Iterator[ReceivingProcesses]:
    processes = ReceivingProcesses()
    try:
        yield processes
    finally:
        processes.close()


def arrives(trainer: PlainGroup, engine: JoinedGroup, num_bytes: int, seed: int) -> bool:
    buffer = engine.landing(num_bytes)
    assert buffer is not None
    receiving = engine.receive_into(buffer, timeout_s=20)
    trainer.broadcast(content(num_bytes, seed), [(0, num_bytes)], timeout_s=20).result(20)
    receiving.result(20)
    return torch.equal(buffer, content(num_bytes, seed))


def parent_of_members(processes: ReceivingProcesses) -> psutil.Process:
    assert processes._process is not None
    return psutil.Process(processes._process.pid)


def test_memory_grows_with_what_comes_and_is_the_same_as_long_as_it_fits(connect: Any) -> None:
    trainer, engine = connect()
    for num_bytes in (100, 3 * MIB + 5, 0, 700):
        assert arrives(trainer, engine, num_bytes, seed=num_bytes)
    first, second = engine.landing(MIB), engine.landing(9)
    assert first.data_ptr() == second.data_ptr()


def test_a_member_that_is_killed_costs_its_group_and_the_next_one_comes_at_once(
    connect: Any, processes: ReceivingProcesses
) -> None:
    _, engine = connect()
    [member] = parent_of_members(processes).children()
    receiving = engine.receive_into(engine.landing(MIB), timeout_s=30)
    member.send_signal(signal.SIGKILL)
    with pytest.raises(TransportError, match="the process that receives"):
        receiving.result(60)
    assert arrives(*connect(), MIB, seed=1)


def test_members_live_on_without_their_parent_and_the_next_one_has_another(
    connect: Any, processes: ReceivingProcesses
) -> None:
    pair = connect()
    parent = parent_of_members(processes)
    parent.send_signal(signal.SIGKILL)
    parent.wait(10)
    assert arrives(*pair, MIB, seed=2)
    assert arrives(*connect(), MIB, seed=3)
    assert parent_of_members(processes).pid != parent.pid


def test_a_group_that_is_left_ends_its_member_whatever_it_waits_for(
    connect: Any, processes: ReceivingProcesses
) -> None:
    trainer, engine = connect()
    receiving = engine.receive_into(engine.landing(MIB), timeout_s=30)
    sending = trainer.broadcast(content(9, 1), [(0, 9)], timeout_s=30)
    sending.result(10)
    engine.destroy()
    assert isinstance(receiving.exception(20), TransportError)
    assert eventually(lambda: not parent_of_members(processes).children())
    with pytest.raises(TransportError, match="make a new one"):
        engine.receive_into(torch.zeros(9, dtype=torch.uint8), timeout_s=1).result(1)


def test_memory_that_is_not_there_is_said_before_anything_is_received(
    connect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, engine = connect()
    with monkeypatch.context() as patch:

        def full(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(torch.OutOfMemoryError, match="No space left"):
            engine.landing(64 * MIB)
    assert arrives(trainer, engine, 2 * MIB, seed=4)


@pytest.mark.parametrize("first", [False, True], ids=["has a parent", "is the first"])
def test_without_descriptors_it_is_refused_and_nothing_is_left_open(
    processes: ReceivingProcesses, first: bool
) -> None:
    starting = ReceivingProcesses() if first else processes
    if not first:
        processes.start(NAME, rank=1, size=2).close()
    before, limits = num_descriptors(), resource.getrlimit(resource.RLIMIT_NOFILE)
    refused = 0
    for spare in range(8):
        taken = []
        resource.setrlimit(resource.RLIMIT_NOFILE, (before + 8, limits[1]))
        try:
            with suppress(OSError):
                while True:
                    taken.append(os.open("/dev/null", os.O_RDONLY))
            for descriptor in taken[:spare]:
                os.close(descriptor)
            starting.start(NAME, rank=1, size=2).close()
        except TransportError as error:
            assert "descriptors" in str(error)
            refused += 1
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            for descriptor in taken[spare:]:
                os.close(descriptor)
    if first:
        starting.close()
    assert refused and num_descriptors() == before


def test_none_outlives_the_process_whose_members_they_are() -> None:
    pool = PeerPool()
    try:
        [owner] = pool.take(1)
        with PlainGroup.serve(world_size=2, group_name=NAME, timeout_s=60) as trainer:
            port = trainer.master_port
            owner.do("join", master_port=port, rank=1, world_size=2, group_name=NAME, timeout_s=60)
            trainer.joined.result(60)
            theirs = psutil.Process(owner.process.pid).children(recursive=True)
            assert len(theirs) == 2
            owner.start("receive", num_bytes=MIB, seed=1)
            owner.signal(signal.SIGKILL)
            psutil.wait_procs(theirs, 10)
            assert not any(process.is_running() for process in theirs)
            owner.pending = 0
    finally:
        pool.close()


def test_what_still_comes_is_read_away_until_all_is_quiet() -> None:
    pairs = [socket.socketpair() for _ in range(3)]
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(pairs[0][1].sendall, bytes(16 * MIB))
        pairs[1][1].close()
        read_away([pair[0] for pair in pairs])
        assert sending.result(1) is None
    for pair in pairs:
        for end in pair:
            with suppress(OSError):
                end.close()


def test_so_many_descriptors_may_be_open(connect: Callable[..., Any]) -> None:
    """An engine of many clients has them, and a child finds its own under the number that its parent had for it."""
    with started_late() as processes, many_descriptors():
        trainer, engine = connect(processes)
        assert arrives(trainer, engine, MIB, seed=5)
