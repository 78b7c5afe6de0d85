"""Gives memory back to the system and takes it again, under tensors and views that stay valid.

On a CPU a tensor's virtual addresses stay reserved and only the pages behind them go: `madvise(MADV_DONTNEED)`. On
CUDA the tensors' storages shrink to nothing and grow again, as FSDP does with its parameters: every view stays valid,
at another address. Captured CUDA graphs would need the old one; memory that is mapped by hand can keep it later, behind
the same two methods. What was in it is lost.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable
from typing import Protocol

import torch

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
            free = torch.cuda.mem_get_info(self._device)[0]
            raise RolloutError(
                f"cannot resume {self.num_bytes} bytes on {self._device}: {free} are free; have the trainer give "
                "memory back (torch.cuda.empty_cache()), and try again"
            ) from error


def region_of(tensors: Iterable[torch.Tensor]) -> MemoryRegion:
    """The region of tensors of one device; `RolloutError` on a device whose memory cannot be given back."""
    tensors = list(tensors)
    kinds = {tensor.device.type for tensor in tensors}
    if kinds == {"cuda"}:
        return CudaRegion(tensors)
    if kinds - {"cpu"}:
        raise RolloutError(
            f"cannot release memory on {', '.join(sorted(kinds))}: expected tensors of one CPU or one CUDA device"
        )
    return CpuRegion(tensors)


def _whole_pages(tensor: torch.Tensor) -> tuple[int, int]:
    page = mmap.PAGESIZE
    start = -(-tensor.data_ptr() // page) * page
    end = (tensor.data_ptr() + tensor.nbytes) // page * page
    return start, max(0, end - start)
