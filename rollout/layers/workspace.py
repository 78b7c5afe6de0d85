"""Named scratch buffers that live as long as the runner.

A fresh tensor of a few megabytes costs a page fault every 4 KiB on a CPU, which is as much as the arithmetic on it. The
buffers here are made once for the largest step and then reused by every layer of every step.
"""

from __future__ import annotations

import math

import torch


class Workspace:
    """Scratch memory of one runner. Not thread-safe: one forward pass at a time."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self.device = device
        self._buffers: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    def take(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """A contiguous tensor of unspecified contents, valid until `name` is taken again."""
        dtype = dtype or self.dtype
        num_elements = math.prod(shape)
        buffer = self._buffers.get((name, dtype))
        if buffer is None or buffer.numel() < num_elements:
            grown = num_elements if buffer is None else max(num_elements, buffer.numel() * 5 // 4)
            buffer = torch.empty(grown, dtype=dtype, device=self.device)
            self._buffers[name, dtype] = buffer
        return buffer[:num_elements].view(shape)

    def release(self) -> None:
        """Give all memory back; the next `take` allocates anew."""
        self._buffers.clear()

    @property
    def num_bytes(self) -> int:
        """Bytes held now."""
        return sum(buffer.nbytes for buffer in self._buffers.values())
