"""An engine rank's end of an arena on a GPU: opened once, believed in nothing, and kept open."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from ..errors import TransportError
from ..plan.plan import Plan
from ..transports.arena import SharedBytes
from ..transports.cuda_ipc import HEADER, HEADER_BYTES, header_of
from ..transports.ipc_memory import Allocation, IpcMemory
from ..wire.messages import CudaIpcHandle, ProcessRef
from ..wire.process import current_process, host_id, why_dead
from .parts_stage import PartsStage
from .shadow_stage import NoStageMemory, StageMemory
from .stage import ArenaStage, check_size
from .uploaded_arena import UploadedStage

logger = logging.getLogger(__name__)


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
            header = allocation.tensor[handle.offset : handle.offset + HEADER.size]
            if bytes(header.cpu().tolist()) != header_of(handle):
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
