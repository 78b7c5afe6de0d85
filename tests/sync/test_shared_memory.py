"""Arenas in shared memory: sealed, nameless, believed only after a check, and gone with their last user."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import torch
from shm import shm_names
from sync_support import (
    ToyEngine,
    arenas_mapped,
    eventually,
    kill,
    num_descriptors,
    read_line,
    weights,
)

from weight_sync import WeightPublisher
from weight_sync.errors import TransportError
from weight_sync.receiver import service
from weight_sync.staging import shadow_stage
from weight_sync.staging.opened_shared_memory import OpenedSharedMemoryArena
from weight_sync.transports.shared_memory import (
    HEADER_BYTES,
    SharedMemoryArena,
)
from weight_sync.wire.messages import SharedMemoryHandle
from weight_sync.wire.process import current_process, why_dead


def changed(handle: SharedMemoryHandle, **fields: Any) -> SharedMemoryHandle:
    return msgspec.structs.replace(handle, **fields)


def test_what_the_trainer_writes_is_what_the_engine_reads() -> None:
    arena = SharedMemoryArena(10_000)
    opened = OpenedSharedMemoryArena(arena.handle)
    arena.buffer.copy_(torch.arange(10_000) % 251)
    assert torch.equal(opened.buffer, (torch.arange(10_000) % 251).to(torch.uint8))
    assert opened.buffer.data_ptr() % 256 == 0 and arena.buffer.data_ptr() % 256 == 0
    arena.close()
    assert opened.buffer[250] == 250  # the engine's mapping outlives the trainer's
    opened.close()


def test_an_arena_of_no_bytes_is_valid() -> None:
    arena = SharedMemoryArena(0)
    opened = OpenedSharedMemoryArena(arena.handle)
    assert opened.buffer.numel() == 0 and opened.buffer.dtype == torch.uint8
    opened.close()
    arena.close()


def test_a_trainer_can_neither_shrink_nor_grow_nor_unseal_an_arena() -> None:
    arena = SharedMemoryArena(8192)
    fd = arena.handle.fd
    for size in (0, HEADER_BYTES, HEADER_BYTES + 16384):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    arena.close()


def test_the_engine_cannot_write_into_an_arena() -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import sync_support\n"
        "from weight_sync.transports.shared_memory import SharedMemoryArena\n"
        "from weight_sync.staging.opened_shared_memory import OpenedSharedMemoryArena\n"
        "arena = SharedMemoryArena(4096)\n"
        "OpenedSharedMemoryArena(arena.handle).buffer.fill_(1)\n"
    )
    folder = os.path.dirname(__file__)
    ended = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, timeout=60)
    assert ended.returncode == -11  # the kernel refuses: the mapping is for reading


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"nonce": bytes(16)}, "another arena"),
        ({"num_bytes": 8191}, "has 12288 bytes, expected 12287"),
        ({"num_bytes": 1 << 40}, "has 12288 bytes"),
        ({"fd": 1 << 20}, "no such descriptor"),
    ],
)
def test_a_handle_that_does_not_fit_is_refused(fields: dict[str, Any], reason: str) -> None:
    arena = SharedMemoryArena(8192)
    with pytest.raises(TransportError, match=reason):
        OpenedSharedMemoryArena(changed(arena.handle, **fields))
    arena.close()


def test_descriptors_of_other_files_are_refused_before_they_are_opened() -> None:
    arena = SharedMemoryArena(8192)
    reader, writer = os.pipe()
    with tempfile.TemporaryFile() as file:
        for fd in (file.fileno(), reader, writer):
            with pytest.raises(TransportError, match="the descriptor is"):
                OpenedSharedMemoryArena(changed(arena.handle, fd=fd))
    os.close(reader)
    os.close(writer)
    arena.close()


@pytest.mark.parametrize("flags", [os.MFD_CLOEXEC, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING])
def test_a_memory_file_without_seals_is_refused(flags: int) -> None:
    arena = SharedMemoryArena(8192)
    fd = os.memfd_create("weight-arena", flags)
    os.ftruncate(fd, HEADER_BYTES + 8192)
    with pytest.raises(TransportError, match="not sealed"):
        OpenedSharedMemoryArena(changed(arena.handle, fd=fd))
    os.close(fd)
    arena.close()


def test_dead_processes_reused_ids_and_other_machines_are_refused() -> None:
    arena = SharedMemoryArena(8192)
    handle = arena.handle
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    owner = msgspec.structs.replace(handle.owner, pid=child.pid)
    with pytest.raises(TransportError, match="its id belongs to another process"):
        OpenedSharedMemoryArena(changed(handle, owner=owner))
    child.communicate(b"\n")
    with pytest.raises(TransportError, match="does not exist"):
        OpenedSharedMemoryArena(changed(handle, owner=owner))
    elsewhere = msgspec.structs.replace(handle.owner, host="another")
    with pytest.raises(TransportError, match="another machine"):
        OpenedSharedMemoryArena(changed(handle, owner=elsewhere))
    arena.close()


def test_a_zombie_is_dead_and_a_process_elsewhere_is_unknown(child: Callable[..., Any]) -> None:
    process = child("engine_process.py")
    read_line(process)
    me = current_process()
    start = int(open(f"/proc/{process.pid}/stat").read().rsplit(")", 1)[1].split()[19])
    there = msgspec.structs.replace(me, pid=process.pid, start_time=start)
    assert why_dead(me) is None and why_dead(there) is None
    kill(process)
    assert why_dead(there) == f"process {process.pid} has ended"
    assert why_dead(msgspec.structs.replace(there, host="another")) is None


def test_closing_gives_back_descriptors_and_mappings_even_while_views_live() -> None:
    descriptors, mapped = num_descriptors(), arenas_mapped()
    arena = SharedMemoryArena(8192)
    opened = OpenedSharedMemoryArena(arena.handle)
    view = opened.buffer[:256].view(torch.int64)
    opened.close()
    arena.close()
    arena.close()
    assert int(view.sum()) == 0  # still readable: the last view unmaps
    assert arenas_mapped() > mapped
    del view
    assert arenas_mapped() == mapped
    assert eventually(
        lambda: num_descriptors() <= descriptors
    )  # other threads open files for a moment


def test_an_arena_has_no_name_that_could_be_left_behind() -> None:
    before = shm_names()
    arena = SharedMemoryArena(8192)
    assert os.readlink(f"/proc/self/fd/{arena.handle.fd}").endswith("(deleted)")
    assert shm_names() <= before
    arena.close()


def test_an_engine_sees_that_a_trainer_has_closed_its_end() -> None:
    arena = SharedMemoryArena(8192)
    opened = OpenedSharedMemoryArena(arena.handle)
    assert not opened.given_up()
    arena.close()
    assert opened.given_up()
    another = SharedMemoryArena(8192)  # may get the same descriptor
    assert opened.given_up()
    another.close()
    opened.close()


def test_an_engine_whose_gpu_can_spare_nothing_writes_from_the_hosts_memory(
    engine: ToyEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(service, "needs_upload", lambda device: True)
    monkeypatch.setattr(shadow_stage, "can_spare", lambda device, num_bytes: False)
    with WeightPublisher(engine, transport="shared_memory") as publisher:
        publisher.publish(weights(1.0))
        assert engine.values() == {1.0} and not engine.receiver.stage_memory.num_bytes
    assert "out of the host's memory" in caplog.text
