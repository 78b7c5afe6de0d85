"""What an update is compared with: one plain copy of the same bytes, and the usual way of moving tensors."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch


class PlainCopy:
    """`target.copy_(source)` of one contiguous tensor with all of torch's threads; every page is touched before."""

    def __init__(self, num_bytes: int) -> None:
        self.source = torch.ones(num_bytes, dtype=torch.uint8)
        self.target = torch.zeros(num_bytes, dtype=torch.uint8)

    def run(self) -> float:
        """Seconds of one copy."""
        start = time.perf_counter()
        self.target.copy_(self.source)
        return time.perf_counter() - start


class UsualWay:
    """What trainers do who flatten: all tensors concatenated to one new buffer, then one copy per tensor out of it.

    Both halves run in this process, which spares the peer what it takes to reach another one.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], memory: torch.Tensor) -> None:
        """`memory` (uint8) becomes the parameters that are written."""
        self._tensors = list(tensors.values())
        (dtype,) = {tensor.dtype for tensor in self._tensors}
        flat = memory.view(dtype)
        self._parameters = []
        first = 0
        for tensor in self._tensors:
            part = flat[first : first + tensor.numel()]
            self._parameters.append(part.view(tensor.shape))
            first += tensor.numel()

    @torch.no_grad()
    def run(self) -> tuple[float, float]:
        """Seconds of the concatenation and of the copies out of it."""
        start = time.perf_counter()
        flat = torch.cat([tensor.flatten() for tensor in self._tensors])
        packed = time.perf_counter()
        first = 0
        for parameter in self._parameters:
            last = first + parameter.numel()
            parameter.copy_(flat[first:last].view(parameter.shape))
            first = last
        return packed - start, time.perf_counter() - packed
