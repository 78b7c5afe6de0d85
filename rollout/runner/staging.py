"""Small arrays on their way to the device: packed into pinned memory, one asynchronous copy, views of the result."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

_ALIGNMENT = 16
"""Kernels are specialised for pointers that 16 divides; every array starts on one."""
_DTYPES = {
    np.dtype(np.int32): torch.int32,
    np.dtype(np.int64): torch.int64,
    np.dtype(np.float32): torch.float32,
    np.dtype(np.uint8): torch.uint8,
    np.dtype(np.bool_): torch.bool,
}

Array = npt.NDArray[Any]


def aligned(num_bytes: int) -> int:
    """`num_bytes`, rounded up so that another array may follow."""
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


class PinnedRing:
    """Pinned host buffers that are written again only when the device has read them; plain memory on a CPU.

    A step's buffer is read before the results of that step are looked at, so with one step ahead nothing ever waits.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._on_cuda = device.type == "cuda"
        self._free: deque[tuple[torch.Tensor, Any]] = deque()

    def take(self, num_bytes: int) -> torch.Tensor:
        """(at least num_bytes) uint8 on the host, to be given back."""
        if self._free and (self._free[0][1] is None or self._free[0][1].query()):
            buffer, _ = self._free.popleft()
            if buffer.numel() >= num_bytes:
                return buffer
        size = max(1 << 16, 1 << (num_bytes - 1).bit_length())
        with torch.inference_mode(False):  # a buffer is written in any mode later
            return torch.empty(size, dtype=torch.uint8, pin_memory=self._on_cuda)

    def give_back(self, buffer: torch.Tensor) -> None:
        """The copy from `buffer` is on the current stream."""
        event = None
        if self._on_cuda:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self._device))
        self._free.append((buffer, event))


class Staging:
    """Uploads a step's arrays; one thread, one stream."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._ring = PinnedRing(device)

    def upload(
        self, arrays: Sequence[Array], into: torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        """Tensors with the contents of `arrays`, on the device, in one copy; views of `into` (uint8) if given."""
        sizes = [aligned(array.nbytes) for array in arrays]
        total = sum(sizes)
        buffer = self._ring.take(total)
        host = buffer.numpy()
        start = 0
        for array, size in zip(arrays, sizes, strict=True):
            host[start : start + array.nbytes] = np.ascontiguousarray(array).view(np.uint8).ravel()
            start += size
        if into is None:
            into = torch.empty(total, dtype=torch.uint8, device=self.device)
        into[:total].copy_(buffer[:total], non_blocking=True)
        self._ring.give_back(buffer)
        views, start = [], 0
        for array, size in zip(arrays, sizes, strict=True):
            raw = into[start : start + array.nbytes]
            views.append(raw.view(_DTYPES[array.dtype]).view(array.shape))
            start += size
        return views
