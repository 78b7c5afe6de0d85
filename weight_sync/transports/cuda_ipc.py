"""Trainer and engine on GPUs of one machine: the engine reads the trainer's arena where it is.

On one GPU nothing crosses anything: the arena is the stage. Between GPUs the bytes cross the link once, while
generation goes on, into a stage on the engine's GPU; each of several ranks reads what it keeps, all at once and without
a group.

The engine opens an allocation once and keeps it. It believes nothing: the machine, the process, the size and a random
nonce in front of the tensors are checked before the first byte is used. No event has to order the two processes: when a
bucket is announced, its fingerprints have been read on the trainer's host, so every byte of it has been written before.
"""

from __future__ import annotations

import logging
import secrets
import struct
import time
from collections.abc import Callable

import torch

from ..errors import TransportError
from ..plan.plan import Plan
from ..plan.stage import ArenaStage, check_size
from ..wire.messages import CudaIpcHandle, ProcessRef
from ..wire.process import current_process, host_id, why_dead
from .arena import SharedBytes
from .group.shadow_stage import NoStageMemory, StageMemory
from .ipc_memory import Allocation, IpcMemory
from .parts_stage import PartsStage
from .uploaded_arena import UploadedStage

logger = logging.getLogger(__name__)

HEADER_BYTES = 4096
"""In front of the tensors."""
_HEADER = struct.Struct("<16sQQ16s")
_MAGIC = b"rollout-gpu-ar01"


class CudaIpcArena(SharedBytes):
    """The trainer's end: an allocation of its own."""

    def __init__(self, num_bytes: int, memory: IpcMemory, *, is_window: bool = False) -> None:
        self._memory = memory
        self._allocation: Allocation | None = memory.allocate(HEADER_BYTES + num_bytes)
        self._buffer = self._allocation.tensor[HEADER_BYTES : HEADER_BYTES + num_bytes]
        self._buffer.zero_()  # what lies between tensors is read with them, and is no NaN then
        try:
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
        header = torch.frombuffer(bytearray(_header(self.handle)), dtype=torch.uint8)
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


class OpenedCudaIpcArena(SharedBytes):
    """An engine rank's end; `TransportError` when the handle does not lead to an arena."""

    def __init__(
        self,
        handle: CudaIpcHandle,
        table: OpenedAllocations,
        stages: StageMemory | None = None,
        *,
        in_parts: bool = False,
    ) -> None:
        """`stages`: where a session's bytes wait that do not stay in the arena. `in_parts`: this is one rank of several
        that each read what they keep."""
        _check_owner(handle)
        self._stages: StageMemory | None = None
        self._is_window, self._in_parts = handle.is_window, in_parts
        self._owner = handle.owner
        self._table = table
        self._key: _Key | None
        self._key, allocation = table.open(handle)
        end = handle.offset + HEADER_BYTES + handle.num_bytes
        try:
            if end > allocation.tensor.numel():
                raise _refusal(
                    handle,
                    f"it has {allocation.tensor.numel()} bytes, expected at least {end}",
                )
            header = allocation.tensor[handle.offset : handle.offset + _HEADER.size]
            if bytes(header.cpu().tolist()) != _header(handle):
                raise _refusal(
                    handle,
                    "its header is of another arena (magic, size, generation or nonce differ)",
                )
        except BaseException:
            self.close()
            raise
        self._buffer = allocation.tensor[handle.offset + HEADER_BYTES : end]
        self.unstaged = False
        needed = handle.is_window or in_parts
        if needed or handle.device != table.device_id:
            assert stages is not None, "an engine has it"
            try:
                stages.hold(sparing=not needed)
                self._stages = stages
                self.unstaged = stages.unstaged
            except NoStageMemory as error:
                if needed:
                    self.close()
                    raise
                logger.warning("every update is read twice over the GPUs' link: %s", error)
            except BaseException:
                self.close()
                raise

    @property
    def buffer(self) -> torch.Tensor:
        """The bytes, on the device of the rank that reads them."""
        return self._buffer

    @property
    def owner(self) -> ProcessRef:
        return self._owner

    def stage(self, plan: Plan) -> ArenaStage | UploadedStage:
        if self._stages is None:
            return ArenaStage(self._buffer, plan)
        if not self._is_window:
            check_size(self._buffer.numel(), plan)
        kind = PartsStage if self._in_parts else UploadedStage
        return kind(self._stages, self._buffer, plan, is_window=self._is_window)

    def close(self) -> None:
        stages, self._stages = self._stages, None
        if stages is not None:
            stages.let_go()
        self._buffer = torch.empty(0, dtype=torch.uint8)
        key, self._key = self._key, None
        if key is not None:
            self._table.close(key)


_Key = tuple[ProcessRef, bytes, int]


class OpenedAllocations:
    """Other processes' allocations that an engine rank has open: each once, however many arenas lie in it.

    Used by one thread at a time.
    """

    def __init__(self, memory: Callable[[], IpcMemory]) -> None:
        """`memory`: asked for when the first one is opened."""
        self._make_memory = memory
        self._memory: IpcMemory | None = None
        self._open: dict[_Key, tuple[Allocation, int]] = {}

    def __len__(self) -> int:
        return len(self._open)

    @property
    def device_id(self) -> str:
        """The GPU of the rank that reads, as handles name it."""
        if self._memory is None:
            self._memory = self._make_memory()
        return self._memory.device_id

    def open(self, handle: CudaIpcHandle) -> tuple[_Key, Allocation]:
        """The allocation of `handle`, opened or already open, and what `close` calls it."""
        if self._memory is None:
            self._memory = self._make_memory()
        key = handle.owner, handle.memory, handle.generation
        held = self._open.get(key)
        if held is None:
            try:
                allocation = self._memory.open(handle.memory)
            except TransportError as error:
                raise _refusal(
                    handle,
                    f"it cannot be opened on GPU {self._memory.device_id}: {error}. GPUs that cannot "
                    "read each other's memory need transport='process_group' or 'shared_memory'",
                ) from error
            held = allocation, 0
        self._open[key] = held[0], held[1] + 1
        return key, held[0]

    def close(self, key: _Key) -> None:
        """One arena of it is closed; with the last one the allocation is."""
        allocation, count = self._open.pop(key)
        if count > 1:
            self._open[key] = allocation, count - 1
        else:
            assert self._memory is not None
            self._memory.close(allocation)


def _header(handle: CudaIpcHandle) -> bytes:
    return _HEADER.pack(_MAGIC, handle.num_bytes, handle.generation, handle.nonce)


def _check_owner(handle: CudaIpcHandle) -> None:
    if handle.owner.host != host_id():
        raise _refusal(
            handle, "the trainer runs on another machine or in another process-id namespace"
        )
    if handle.owner == current_process():
        raise _refusal(handle, "it is of this process itself, which needs transport='local'")
    why = why_dead(handle.owner)
    if why is not None:
        raise _refusal(handle, why)


def _refusal(handle: CudaIpcHandle, why: str) -> TransportError:
    return TransportError(
        f"cannot open the trainer's arena (process {handle.owner.pid}, GPU {handle.device}, {handle.num_bytes} bytes): "
        f"{why}; expected memory made by weight_sync.WeightPublisher in a living process of this machine; connect again"
    )
