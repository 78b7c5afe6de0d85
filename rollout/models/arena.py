"""All parameters of a dtype in one buffer, in the order of the checkpoint's names.

A parameter starts on a 256-byte boundary. Where the parts of a fused parameter are multiples of 256 bytes, as they are
in any model of real size, the buffer has the byte layout that `weight_sync.Manifest` gives the same tensors, so an
update that brings the whole model is one copy.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from weight_sync.devices.mapped_memory import MappedMemory, mapped_tensor
from weight_sync.layout.manifest import ALIGNMENT, align


class ParameterArena:
    """Owns the bytes behind a model's parameters. They get their storage here, once, and are never rebound."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.buffers: dict[torch.dtype, torch.Tensor] = {}
        self.mapped: list[MappedMemory] = []
        """What is behind the buffers, where it can come and go without moving them."""

    def materialize(self, model: nn.Module, order: Iterable[nn.Parameter]) -> None:
        """Give every meta parameter of `model` its place; `order` names each parameter once, in memory order."""
        offsets: dict[int, int] = {}
        sizes: dict[torch.dtype, int] = {}
        for parameter in order:
            start = sizes.get(parameter.dtype, 0)
            offsets[id(parameter)] = start
            sizes[parameter.dtype] = start + align(parameter.nbytes)
        try:
            for dtype, size in sizes.items():
                self.buffers[dtype] = self._aligned(size)
        except BaseException:
            self.free()
            raise
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                start = offsets[id(parameter)]
                raw = self.buffers[parameter.dtype][start : start + parameter.nbytes]
                view = raw.view(parameter.dtype).view(parameter.shape)
                setattr(module, name, nn.Parameter(view, requires_grad=False))

    def free(self) -> None:
        """Give back what was mapped by hand, after all work that uses it, and after all who may look at parameters; the
        rest goes with its tensors. Safe to repeat."""
        if self.mapped:
            torch.cuda.synchronize(self.device)
        for memory in self.mapped:
            memory.free()

    def _aligned(self, num_bytes: int) -> torch.Tensor:
        """Zeros that start on a 256-byte boundary; on a CPU torch promises only 64."""
        spare, memory = mapped_tensor(num_bytes + ALIGNMENT, self.device)
        if memory is not None:
            self.mapped.append(memory)
        start = -spare.data_ptr() % ALIGNMENT
        return spare[start : start + num_bytes]

    @property
    def num_bytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.nbytes for buffer in self.buffers.values())
