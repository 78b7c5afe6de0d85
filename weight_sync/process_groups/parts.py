"""Buffers as the parts that travel: cut, allocated and checked before anything is sent."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Sequence

import torch

from ..errors import TransportError
from ..layout.memory import Range

MADV_POPULATE_WRITE = 23
DEFAULT_PART_BYTES = 64 << 20
"""With several of these under way at once, a loopback or a fast network is busy all the time."""


def cut(buffer: torch.Tensor, ranges: Sequence[Range] | None) -> list[torch.Tensor]:
    """The `ranges` of a uint8 buffer as views; None: all of it, in parts of `DEFAULT_PART_BYTES`."""
    if buffer.dtype != torch.uint8 or buffer.dim() != 1 or not buffer.is_contiguous():
        raise TransportError(
            f"cannot send or receive a {buffer.dtype} buffer of shape {tuple(buffer.shape)}, expected contiguous bytes "
            "(uint8, one dimension); pass a view of it as uint8"
        )
    size = buffer.numel()
    if ranges is None:
        step = DEFAULT_PART_BYTES
        ranges = [(start, min(start + step, size)) for start in range(0, size, step)]
    for start, stop in ranges:
        if not 0 <= start <= stop <= size:
            raise TransportError(
                f"a range does not fit: got bytes {start} to {stop}, expected a part of a buffer of {size}; check the "
                "layout"
            )
    return [buffer[start:stop] for start, stop in ranges]


def receive_buffer(num_bytes: int) -> torch.Tensor:
    """New memory for `num_bytes` that arrive, uint8 on the CPU: large pages where the system has them, all there."""
    if not num_bytes:
        return torch.empty(0, dtype=torch.uint8)
    try:
        memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, ValueError) as error:
        raise torch.OutOfMemoryError(str(error)) from error
    for advice in (mmap.MADV_HUGEPAGE, MADV_POPULATE_WRITE):
        with contextlib.suppress(OSError, ValueError):  # hints
            memory.madvise(advice)
    return torch.frombuffer(memory, dtype=torch.uint8)
