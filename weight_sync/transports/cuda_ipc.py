"""Trainer and engine on GPUs of one machine: the engine reads the trainer's arena where it is.

On one GPU nothing crosses anything: the arena is the stage. Between GPUs the bytes cross the link once, while
generation goes on, into a stage on the engine's GPU; each of several ranks reads what it keeps, all at once and without
a group.

The engine opens an allocation once and keeps it. It believes nothing: the machine, the process, the size and a random
nonce in front of the tensors are checked before the first byte is used. No event has to order the two processes: when a
bucket is announced, its fingerprints have been read on the trainer's host, so every byte of it has been written before.
"""

from __future__ import annotations

import secrets
import struct
import time

import torch

from ..wire.messages import CudaIpcHandle
from ..wire.process import current_process
from .arena import SharedBytes
from .ipc_memory import Allocation, IpcMemory

HEADER_BYTES = 4096
"""In front of the tensors."""
HEADER = struct.Struct("<16sQQ16s")
_MAGIC = b"rollout-gpu-ar01"


class CudaIpcArena(SharedBytes):
    """The trainer's end: an allocation of its own."""

    def __init__(self, num_bytes: int, memory: IpcMemory, *, is_window: bool = False) -> None:
        self._memory = memory
        self._allocation: Allocation | None = memory.allocate(HEADER_BYTES + num_bytes)
        self._buffer = self._allocation.tensor[HEADER_BYTES : HEADER_BYTES + num_bytes]
        try:
            self._buffer.zero_()  # what lies between tensors is read with them, and is no NaN then
            exported, offset = memory.export(self._allocation)
        except BaseException:
            self.close()
            raise
        self.handle = CudaIpcHandle(
            owner=current_process(),
            device=memory.device_id,
            memory=exported,
            generation=time.monotonic_ns(),
            offset=offset,
            num_bytes=num_bytes,
            nonce=secrets.token_bytes(16),
            is_window=is_window,
        )
        header = torch.frombuffer(bytearray(header_of(self.handle)), dtype=torch.uint8)
        self._allocation.tensor[: len(header)].copy_(header)

    @property
    def buffer(self) -> torch.Tensor:
        assert self._allocation is not None, "the arena was closed"
        return self._buffer

    def close(self) -> None:
        """Give the memory back. The engine must have closed its end, or be dead."""
        allocation, self._allocation = self._allocation, None
        if allocation is not None:
            self._buffer = torch.empty(0, dtype=torch.uint8)
            self._memory.free(allocation)


def header_of(handle: CudaIpcHandle) -> bytes:
    """What stands in front of the tensors."""
    return HEADER.pack(_MAGIC, handle.num_bytes, handle.generation, handle.nonce)
