"""Gives memory back to the system and takes it again, under tensors and views that stay valid, at their addresses.

On a CPU a tensor's virtual addresses stay reserved and only the pages behind them go: `madvise(MADV_DONTNEED)`. On
CUDA the memory behind mapped addresses is unmapped and mapped anew, so captured graphs stay valid too; where a driver
cannot do that, storages shrink to nothing and grow again, as FSDP does with its parameters, at another address. What
was in it is lost.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable
from typing import Protocol

import torch

from weight_sync.devices.driver import DeviceOutOfMemory
from weight_sync.devices.mapped_memory import MappedMemory

from ..errors import RolloutError

_MADV_DONTNEED = 4


class MemoryRegion(Protocol):
    """Some memory that can be without pages for a while."""

    @property
    def num_bytes(self) -> int:
        """Bytes that `release` gives back."""

    def release(self) -> None:
        """Give the pages back; the content is lost. The memory must not be used until `resume`."""

    def resume(self) -> None:
        """Make the memory usable again; it holds zeros, or anything. `RolloutError` when there is none left."""


class CpuRegion:
    """The whole pages of CPU tensors; the system provides new ones when they are next written."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        spans = [_whole_pages(tensor) for tensor in tensors]
        self._spans = [(start, size) for start, size in spans if size > 0]
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

    @property
    def num_bytes(self) -> int:
        """Bytes that `release` gives back."""
        return sum(size for _, size in self._spans)

    def release(self) -> None:
        """Give the pages back; the content is lost."""
        for start, size in self._spans:
            if self._libc.madvise(start, size, _MADV_DONTNEED):
                code = ctypes.get_errno()
                raise RolloutError(
                    f"madvise of {size} bytes failed with errno {code}; memory stays occupied"
                )

    def resume(self) -> None:
        """Nothing to do: pages come back when they are written."""


class MappedRegion:
    """Memory of a GPU behind addresses that stay."""

    def __init__(self, memories: Iterable[MappedMemory], device: torch.device) -> None:
        self._memories = list(memories)
        self._device = device

    @property
    def num_bytes(self) -> int:
        """Bytes that `release` gives back."""
        return sum(memory.num_bytes for memory in self._memories)

    def release(self) -> None:
        """Give the memory back, after all work that may still use it; the content is lost."""
        torch.cuda.synchronize(self._device)
        for memory in self._memories:
            memory.release()

    def resume(self) -> None:
        """Take memory again; holds anything. `RolloutError` when another process has taken it."""
        try:
            try:
                self._map()
            except DeviceOutOfMemory:  # torch may keep what an update took meanwhile
                torch.cuda.empty_cache()
                self._map()
        except DeviceOutOfMemory as error:
            self.release()
            raise _none_left(self.num_bytes, self._device) from error
        except BaseException:
            self.release()
            raise

    def _map(self) -> None:
        for memory in self._memories:
            memory.resume()


class CudaRegion:
    """Whole allocations of CUDA tensors; what torch keeps cached of them is given back to the device, too."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        storages = [tensor.untyped_storage() for tensor in tensors]
        self._device = storages[0].device
        self._sizes = [(storage, storage.nbytes()) for storage in storages]

    @property
    def num_bytes(self) -> int:
        """Bytes that `release` gives back."""
        return sum(size for _, size in self._sizes)

    def release(self) -> None:
        """Give the memory back, after all work that may still use it; the content is lost."""
        torch.cuda.synchronize(self._device)
        for storage, _ in self._sizes:
            storage.resize_(0)
        torch.cuda.empty_cache()

    def resume(self) -> None:
        """Allocate again; holds anything. `RolloutError` when another process has taken the memory."""
        try:
            for storage, size in self._sizes:
                storage.resize_(size)
        except torch.OutOfMemoryError as error:
            self.release()
            raise _none_left(self.num_bytes, self._device) from error


class HostCopy:
    """What tensors hold, in memory of the host that a GPU copies to and from at its link's rate."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        self._live = list(tensors)
        self._kept = [
            torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            for tensor in self._live
        ]

    def take(self) -> None:
        """Keep what they hold now."""
        self._copy(self._kept, self._live)

    def restore(self) -> None:
        """Write back what was kept."""
        self._copy(self._live, self._kept)

    def _copy(self, targets: Iterable[torch.Tensor], sources: Iterable[torch.Tensor]) -> None:
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source, non_blocking=True)
        for device in {tensor.device for tensor in self._live if tensor.is_cuda}:
            torch.cuda.synchronize(device)


def region_of(
    tensors: Iterable[torch.Tensor], mapped: Iterable[MappedMemory | None] = ()
) -> MemoryRegion:
    """The region of tensors of one device; `RolloutError` on a device whose memory cannot be given back.

    `mapped`: what is behind all of them, where that is known.
    """
    tensors, behind = list(tensors), list(mapped)
    memories = [memory for memory in behind if memory is not None]
    if memories and len(memories) == len(behind):
        return MappedRegion(memories, tensors[0].device)
    kinds = {tensor.device.type for tensor in tensors}
    if kinds == {"cuda"}:
        return CudaRegion(tensors)
    if kinds - {"cpu"}:
        raise RolloutError(
            f"cannot release memory on {', '.join(sorted(kinds))}: expected tensors of one CPU or one CUDA device"
        )
    return CpuRegion(tensors)


def _none_left(num_bytes: int, device: torch.device) -> RolloutError:
    free = torch.cuda.mem_get_info(device)[0]
    return RolloutError(
        f"cannot resume {num_bytes} bytes on {device}: {free} are free; have the trainer give memory back "
        "(torch.cuda.empty_cache()), and try again"
    )


def _whole_pages(tensor: torch.Tensor) -> tuple[int, int]:
    page = mmap.PAGESIZE
    start = -(-tensor.data_ptr() // page) * page
    end = (tensor.data_ptr() + tensor.nbytes) // page * page
    return start, max(0, end - start)
