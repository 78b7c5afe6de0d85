"""Memory files behind the handles of CUDA IPC, so that its protocol runs where there is no GPU.

As on a GPU, an allocation is found by 64 bytes, opened once, and gone with the process that made it.
"""

from __future__ import annotations

import os
import secrets
import struct
from typing import Any

import torch

from weight_sync.errors import TransportError
from weight_sync.transports.arena import Mapping
from weight_sync.transports.ipc_memory import Allocation

_HANDLE = struct.Struct("<QQQ16s")
DEVICE_ID = "0" * 32


class MemoryFiles:
    """`IpcMemory` over anonymous files."""

    def __init__(self, device_id: str = DEVICE_ID) -> None:
        self._device_id = device_id
        self._files: dict[int, tuple[int, Mapping]] = {}
        self._open: dict[int, tuple[bytes, Mapping]] = {}
        self.num_opened = 0

    @property
    def device_id(self) -> str:
        return self._device_id

    def allocate(self, num_bytes: int) -> Allocation:
        fd = os.memfd_create("weight-arena", os.MFD_CLOEXEC)
        os.ftruncate(fd, num_bytes)
        mapping = Mapping(fd, num_bytes, writable=True)
        address = mapping.tensor.data_ptr()
        self._files[address] = fd, mapping
        return Allocation(address=address, tensor=mapping.tensor)

    def export(self, allocation: Allocation) -> tuple[bytes, int]:
        fd, mapping = self._files[allocation.address]
        raw = _HANDLE.pack(os.getpid(), fd, mapping.tensor.numel(), secrets.token_bytes(16))
        return raw.ljust(64, b"\0"), 0

    def free(self, allocation: Allocation) -> None:
        fd, mapping = self._files.pop(allocation.address)
        os.close(fd)
        mapping.close()

    def open(self, handle: bytes) -> Allocation:
        pid, fd, num_bytes, _ = _HANDLE.unpack_from(handle)
        if any(handle == raw for raw, _ in self._open.values()):
            raise TransportError("the allocation is open already")
        try:
            here = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise TransportError(f"no such memory: {error}") from error
        mapping = Mapping(here, num_bytes, writable=True)
        os.close(here)
        self.num_opened += 1
        address = mapping.tensor.data_ptr()
        self._open[address] = handle, mapping
        return Allocation(address=address, tensor=mapping.tensor)

    def close(self, allocation: Allocation) -> None:
        self._open.pop(allocation.address)[1].close()


def stand_in(patch: Any) -> MemoryFiles:
    """Have both ends of this process use memory files; `patch`: a `pytest.MonkeyPatch`, or what has its `setattr`."""
    from weight_sync.publisher import endpoint
    from weight_sync.receiver import service

    memory = MemoryFiles()
    patch.setattr(endpoint, "ipc_memory_of", lambda device: memory)
    patch.setattr(endpoint, "_gpu", lambda number: torch.device("cpu"))
    patch.setattr(service, "ipc_memory_of", lambda device: memory)
    return memory


def stand_in_for_ranks(patch: Any) -> None:
    """Have ranks of an engine that this process starts use memory files, each on a GPU of its own: the first one is on
    the trainer's."""
    from weight_sync.receiver import service
    from weight_sync.staging.opened_cuda_ipc import OpenedAllocations

    made = service.WeightService.__init__

    def make(self: Any, receiver: Any, **options: Any) -> None:
        made(self, receiver, **options)
        memory = MemoryFiles(f"{receiver.rank:032x}")
        self._allocations = OpenedAllocations(lambda: memory)

    patch.setattr(service.WeightService, "__init__", make)


class PlainPatch:
    """`setattr` for a process that ends with its patches."""

    setattr = staticmethod(setattr)
