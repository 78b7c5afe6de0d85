"""The protocol of CUDA IPC: handles that lead nowhere, allocations that are opened once, ends that go away.

Without a GPU it runs over memory files; everything but the driver's own calls is the same.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
import torch
from ipc_stand_in import MemoryFiles, stand_in
from stopped import go_on, stop
from sync_support import ALIAS, ToyEngine, eventually, kill, read_line, weights

import weight_sync
from weight_sync import WeightPublisher
from weight_sync.devices.raw_memory import tensor_at
from weight_sync.errors import (
    DeadlineExceeded,
    FingerprintMismatch,
    ManifestMismatch,
    ProtocolError,
    SessionBusy,
    StaleVersionError,
    SyncError,
    TransportError,
)
from weight_sync.publisher.update import Update
from weight_sync.staging.opened_cuda_ipc import OpenedAllocations, OpenedCudaIpcArena
from weight_sync.transports.cuda_ipc import CudaIpcArena
from weight_sync.wire.messages import CudaIpcHandle, OpenArena
from weight_sync.wire.process import current_process


class Trainer(MemoryFiles):
    """Another process, as far as the engine's end can see."""

    def arena(self, num_bytes: int, owner: Any) -> CudaIpcArena:
        made = CudaIpcArena(num_bytes, self)
        made.handle = msgspec.structs.replace(made.handle, owner=owner)
        return made


@pytest.fixture
def other(child: Callable[..., Any]) -> Any:
    """A living process that is not this one."""
    process = child("engine_process.py")
    read_line(process)
    owner = msgspec.structs.replace(current_process(), pid=process.pid)
    with open(f"/proc/{process.pid}/stat") as stat:
        start = int(stat.read().rsplit(")", 1)[1].split()[19])
    return msgspec.structs.replace(owner, start_time=start)


@pytest.fixture
def trainer() -> Iterator[Trainer]:
    memory = Trainer()
    yield memory
    for address, (_, mapping) in list(memory._files.items()):
        from weight_sync.transports.ipc_memory import Allocation

        memory.free(Allocation(address=address, tensor=mapping.tensor))


def test_an_allocation_is_opened_once_however_many_arenas_lie_in_it(
    trainer: Trainer, other: Any
) -> None:
    engine = MemoryFiles()
    table = OpenedAllocations(lambda: engine)
    arena = trainer.arena(1000, other)
    arena.buffer.fill_(3)
    first = OpenedCudaIpcArena(arena.handle, table)
    second = OpenedCudaIpcArena(arena.handle, table)
    assert engine.num_opened == 1 and len(table) == 1
    first.close()
    first.close()
    assert second.buffer.tolist() == [3] * 1000
    second.close()
    assert len(table) == 0
    OpenedCudaIpcArena(arena.handle, table).close()
    assert engine.num_opened == 2


def test_the_engine_sees_what_the_trainer_writes_later(trainer: Trainer, other: Any) -> None:
    table = OpenedAllocations(MemoryFiles)
    arena = trainer.arena(64, other)
    opened = OpenedCudaIpcArena(arena.handle, table)
    arena.buffer.copy_(torch.arange(64, dtype=torch.uint8))
    assert opened.buffer.tolist() == list(range(64))
    opened.close()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"nonce": b"x" * 16}, "its header is of another arena"),
        ({"generation": 5}, "its header is of another arena"),
        ({"num_bytes": 1 << 40}, "expected at least"),
        ({"offset": 1 << 40}, "expected at least"),
        ({"memory": b"\xff" * 64}, "no such memory"),
        (
            {"owner": msgspec.structs.replace(current_process(), host="elsewhere")},
            "another machine",
        ),
        ({"owner": current_process()}, "this process itself"),
        ({"owner": msgspec.structs.replace(current_process(), start_time=1)}, "has ended"),
    ],
)
def test_a_handle_that_leads_to_no_arena_is_refused_and_nothing_stays_open(
    trainer: Trainer, other: Any, change: dict[str, Any], words: str
) -> None:
    table = OpenedAllocations(MemoryFiles)
    arena = trainer.arena(1000, other)
    handle = msgspec.structs.replace(arena.handle, **change)
    with pytest.raises(TransportError, match=words):
        OpenedCudaIpcArena(handle, table)
    assert len(table) == 0
    OpenedCudaIpcArena(arena.handle, table).close()


def test_a_handle_travels_as_a_typed_message_and_nothing_else_does(
    trainer: Trainer, other: Any
) -> None:
    message = OpenArena(handle=trainer.arena(10, other).handle)
    raw = msgspec.msgpack.encode(message)
    assert msgspec.msgpack.decode(raw, type=OpenArena) == message
    for name, value in (("memory", b"short"), ("device", "GPU-0"), ("nonce", b"")):
        fields = msgspec.to_builtins(message.handle, builtin_types=(bytes,)) | {name: value}
        with pytest.raises(msgspec.ValidationError):
            msgspec.convert(fields, CudaIpcHandle)


def test_an_engine_on_the_cpu_says_that_it_has_no_gpu_memory_to_open(
    engine: ToyEngine, monkeypatch: pytest.MonkeyPatch, make_engine: Callable[..., ToyEngine]
) -> None:
    from weight_sync.receiver import service

    real = service.ipc_memory_of
    stand_in(monkeypatch)
    monkeypatch.setattr(service, "ipc_memory_of", real)
    served = make_engine(serve=True)
    with (
        WeightPublisher(served.address, transport="cuda_ipc", timeout_s=10) as publisher,
        pytest.raises(TransportError, match="this process itself"),
    ):
        publisher.publish(weights(1.0))
    with (
        WeightPublisher(engine, transport="cuda_ipc") as publisher,
        pytest.raises(TransportError, match=r"expected one in another; use 'auto' or 'local'"),
    ):
        publisher.publish(weights(1.0))


def test_a_trainer_without_a_gpu_is_told_so(make_engine: Callable[..., ToyEngine]) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    served = make_engine(serve=True)
    with (
        WeightPublisher(served.address, transport="cuda_ipc") as publisher,
        pytest.raises(TransportError, match="a process without one"),
    ):
        publisher.publish(weights(1.0))
    assert served.values() == {0.0}


@pytest.mark.parametrize("phase", ["begin", "stage", "vote", "commit"])
def test_a_trainer_that_is_killed_leaves_nothing_open_and_the_next_one_is_served(
    child: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    stand_in(monkeypatch)
    process = child("engine_process.py")
    address = read_line(process)

    def state() -> dict[str, Any]:
        process.stdin.write("state\n")
        process.stdin.flush()
        found: dict[str, Any] = json.loads(read_line(process))
        return found

    doomed = child("trainer_process.py", address, phase, "cuda_ipc")
    assert read_line(doomed) == "ready"
    assert state()["opened"] == 1
    kill(doomed)
    assert eventually(lambda: state()["still_open"] == 0)
    with WeightPublisher(address, transport="cuda_ipc", timeout_s=20) as publisher:
        publisher.publish(weights(5.0))
    assert state()["values"] == [5.0] and state()["mixtures"] == []
    assert eventually(lambda: state()["still_open"] == 0)


def test_an_engine_that_is_killed_gives_the_trainer_its_error_and_its_memory_back(
    child: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from weight_sync.errors import EngineDiedError

    memory = stand_in(monkeypatch)
    process = child("engine_process.py")
    publisher = WeightPublisher(read_line(process), transport="cuda_ipc", timeout_s=20)
    publisher.publish(weights(1.0))
    assert len(memory._files) == 1
    publisher.begin()
    kill(process)
    with pytest.raises(EngineDiedError):
        publisher.send(weights(2.0))
    publisher.close()
    assert eventually(lambda: len(memory._files) == 0)


@pytest.mark.parametrize("end", ["goes on", "dies"])
@pytest.mark.parametrize("when", ["at the close", "at an update that came too late"])
def test_memory_that_an_engine_may_still_read_is_kept_beyond_the_close_of_its_publisher(
    child: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, when: str, end: str
) -> None:
    """CUDA leaves it undefined what becomes of memory that is given back before who has opened it lets go of it."""
    memory = stand_in(monkeypatch)
    threads = set(threading.enumerate())
    process = child("engine_process.py")
    publisher = WeightPublisher(read_line(process), transport="cuda_ipc", timeout_s=20)
    publisher.publish(weights(1.0))
    stop(process.pid)
    try:
        if when == "at an update that came too late":
            with pytest.raises(DeadlineExceeded):
                publisher.publish(weights(2.0), timeout_s=0.3)
        publisher.close()
        time.sleep(0.5)
        assert len(memory._files) == 1, "the engine is there and has it open"
    finally:
        if end == "dies":
            kill(process)
        go_on(process.pid)
    assert eventually(lambda: len(memory._files) == 0)
    assert eventually(lambda: set(threading.enumerate()) <= threads), "the connection stays"


@pytest.fixture
def far(
    child: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[WeightPublisher, Callable[[], dict[str, Any]]]]:
    """A publisher whose engine knows its manifest, and what that engine holds."""
    stand_in(monkeypatch)
    process = child("engine_process.py")
    with WeightPublisher(read_line(process), transport="cuda_ipc", timeout_s=20) as publisher:
        publisher.publish(weights(1.0))

        def state() -> dict[str, Any]:
            process.stdin.write("state\n")
            process.stdin.flush()
            found: dict[str, Any] = json.loads(read_line(process))
            return found

        yield publisher, state


def test_an_update_whose_manifest_is_known_waits_for_no_message_before_the_last(
    far: tuple[WeightPublisher, Callable[[], dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher, state = far
    channel = publisher._endpoint.channel()
    sent: list[str] = []
    submit = channel.submit

    def noted(message: Any, timeout_s: float) -> Any:
        sent.append(type(message).__name__)
        return submit(message, timeout_s)

    monkeypatch.setattr(channel, "submit", noted)
    monkeypatch.setattr(channel, "call", lambda *_: pytest.fail("it waited"))
    report = publisher.publish(weights(2.0))
    assert sent == ["Begin", "Bucket", "Commit"]
    assert report.version == 2 and state()["values"] == [2.0]


def test_the_first_thing_that_is_wrong_is_the_error_when_all_messages_are_under_way(
    far: tuple[WeightPublisher, Callable[[], dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher, state = far
    with pytest.raises(StaleVersionError):
        publisher.publish(weights(2.0), version=1)
    with pytest.raises(StaleVersionError):
        publisher.publish(weights(2.0), base_version=7)
    with WeightPublisher(publisher._endpoint._target, transport="cuda_ipc") as other:
        other.begin()
        with pytest.raises(SessionBusy):
            publisher.publish(weights(2.0))
    real = Update._submit_bucket

    def damaged(update: Update, packed: Any, deadline: Any) -> None:
        update.packed.buffer[0] ^= 1
        real(update, packed, deadline)

    monkeypatch.setattr(Update, "_submit_bucket", damaged)
    with pytest.raises(FingerprintMismatch, match="staged bytes of 1 tensors"):
        publisher.publish(weights(2.0))
    monkeypatch.undo()
    assert state()["values"] == [1.0] and state()["version"] == 1


def test_an_engine_that_has_forgotten_the_manifest_is_told_it_again(
    far: tuple[WeightPublisher, Callable[[], dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher, state = far
    real = Update._begin_request
    asked: list[bool] = []

    def forgotten(update: Update, deadline: Any, *, with_manifest: bool) -> Any:
        asked.append(with_manifest)
        request = real(update, deadline, with_manifest=with_manifest)
        if with_manifest:
            return request
        return msgspec.structs.replace(request, manifest_digest="0" * 32)

    monkeypatch.setattr(Update, "_begin_request", forgotten)
    assert publisher.publish(weights(2.0)).version == 2
    assert asked == [False, True] and state()["values"] == [2.0]


def test_an_arena_of_two_buckets_is_filled_and_read_in_turn(
    far: tuple[WeightPublisher, Callable[[], dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, state = far
    places: list[int | None] = []
    real = Update._submit_bucket

    def noted(update: Update, packed: Any, deadline: Any) -> None:
        places.append(packed.at)
        real(update, packed, deadline)

    monkeypatch.setattr(Update, "_submit_bucket", noted)
    with WeightPublisher(
        first._endpoint._target, transport="cuda_ipc", arena_bytes=2048
    ) as publisher:
        for value in (2.0, 3.0):
            report = publisher.publish(weights(value))
            assert state()["values"] == [value]
            assert report.fingerprint == weight_sync.fingerprint(weights(value))
        packed = publisher._endpoint._packed
        assert packed is not None and packed.buffer.numel() == 2048
        assert len(places) >= 6 and set(places) == {0, 1024}
        assert all(a != b for a, b in itertools.pairwise(places[: len(places) // 2]))
        with pytest.raises(ManifestMismatch, match="tied tensor apart from its twin"):
            publisher.publish(iter([*weights(4.0).items(), (ALIAS, weights(4.0)["embed.weight"])]))
        publisher.publish(weights(5.0) | {ALIAS: weights(5.0)["embed.weight"]})
        assert state()["values"] == [5.0] and state()["mixtures"] == []
    with (
        WeightPublisher(first._endpoint._target, transport="cuda_ipc", arena_bytes=1000) as small,
        pytest.raises(TransportError, match="expected at least 1536"),
    ):
        small.publish(weights(6.0))


class Elsewhere(MemoryFiles):
    """The memory of another GPU of the machine."""

    device_id = "1" * 32


@pytest.mark.parametrize("room", [True, False])
def test_an_arena_on_another_gpu_is_read_once_into_a_stage_where_there_is_room(
    make_engine: Callable[..., ToyEngine], monkeypatch: pytest.MonkeyPatch, room: bool
) -> None:
    from weight_sync.receiver import service
    from weight_sync.staging import opened_cuda_ipc, shadow_stage

    stand_in(monkeypatch)
    monkeypatch.setattr(service, "ipc_memory_of", lambda device: Elsewhere())
    # The trainer is here too.
    monkeypatch.setattr(opened_cuda_ipc, "_check_owner", lambda handle: None)
    monkeypatch.setattr(shadow_stage, "can_spare", lambda device, num_bytes: room)
    engine = make_engine(serve=True)
    with WeightPublisher(engine.address, transport="cuda_ipc", timeout_s=10) as publisher:
        for value in (1.0, 2.0):
            report = publisher.publish(weights(value))
            assert engine.values() == {value}
            assert report.fingerprint == weight_sync.fingerprint(weights(value))
        assert (engine.receiver.stage_memory.num_bytes > 0) is room
        packed = publisher._endpoint._packed
        assert packed is not None
        publisher.begin()
        publisher.send(weights(3.0))
        packed.buffer[0] ^= 1  # after it was announced: a stage has the bytes already
        if room:
            publisher.commit()
            assert engine.values() == {3.0}
        else:
            with pytest.raises(SyncError, match="not what the trainer sent"):
                publisher.commit()
            publisher.publish(weights(3.0))
    assert eventually(lambda: engine.receiver.stage_memory.num_bytes == 0)
    assert len(engine.service._allocations) == 0


def test_a_place_of_its_own_is_for_buckets_of_a_window_alone(
    far: tuple[WeightPublisher, Callable[[], dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher, state = far
    real = Update._submit_bucket

    def placed(at: int | None) -> None:
        monkeypatch.setattr(
            Update,
            "_submit_bucket",
            lambda update, packed, deadline: real(
                update, dataclasses.replace(packed, at=at), deadline
            ),
        )

    placed(0)
    with pytest.raises(ProtocolError, match="expected None"):
        publisher.publish(weights(2.0))
    placed(None)
    with (
        WeightPublisher(
            publisher._endpoint._target, transport="cuda_ipc", arena_bytes=2048
        ) as window,
        pytest.raises(ProtocolError, match="at=None"),
    ):
        window.publish(weights(2.0))
    placed(1 << 20)
    with (
        WeightPublisher(
            publisher._endpoint._target, transport="cuda_ipc", arena_bytes=2048
        ) as window,
        pytest.raises(ProtocolError, match="out of its arena"),
    ):
        window.publish(weights(2.0))
    assert state()["values"] == [1.0]


def test_a_tensor_lies_over_memory_that_torch_did_not_allocate() -> None:
    owner = torch.arange(200, dtype=torch.uint8)
    tensor = tensor_at(owner.data_ptr() + 8, 100, torch.device("cpu"))
    assert tensor.tolist() == list(range(8, 108)) and tensor.dtype == torch.uint8
    tensor.fill_(1)
    assert int(owner[8:108].sum()) == 100 and int(owner[108]) == 108
    del tensor
    assert tensor_at(owner.data_ptr(), 0, torch.device("cpu")).numel() == 0
