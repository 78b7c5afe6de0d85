"""Buffers as the parts that travel: cut, allocated and checked before anything is sent."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import TransportError
from ..layout.manifest import TensorMeta, align, mismatch
from ..layout.memory import Range
from .expected import receive_buffer

DEFAULT_PART_BYTES = 64 << 20
"""With several of these under way at once, a loopback or a fast network is busy all the time."""


def cut(buffer: torch.Tensor, spans: Sequence[Range] | None) -> list[torch.Tensor]:
    """The `spans` of a uint8 buffer as views; None: all of it, in parts of `DEFAULT_PART_BYTES`."""
    if buffer.dtype != torch.uint8 or buffer.dim() != 1 or not buffer.is_contiguous():
        raise TransportError(
            f"cannot send or receive a {buffer.dtype} buffer of shape {tuple(buffer.shape)}, expected contiguous bytes "
            "(uint8, one dimension); pass a view of it as uint8"
        )
    size = buffer.numel()
    if spans is None:
        step = DEFAULT_PART_BYTES
        spans = [(start, min(start + step, size)) for start in range(0, size, step)]
    for start, stop in spans:
        if not 0 <= start <= stop <= size:
            raise TransportError(
                f"a span does not fit: got bytes {start} to {stop}, expected a part of a buffer of {size}; check the "
                "layout"
            )
    return [buffer[start:stop] for start, stop in spans]


def allocate(metas: Sequence[TensorMeta], device: torch.device) -> list[torch.Tensor]:
    """New tensors in one allocation, with scratch behind the last one on the CPU."""
    sizes = [align(meta.num_bytes) for meta in metas]
    if device.type == "cpu":
        buffer = receive_buffer(sum(sizes))
    else:
        buffer = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
    tensors, start = [], 0
    for meta, size in zip(metas, sizes, strict=True):
        tensors.append(buffer[start : start + meta.num_bytes].view(meta.dtype).view(meta.shape))
        start += size
    return tensors


def check_tensors(metas: Sequence[TensorMeta], tensors: Sequence[torch.Tensor]) -> None:
    """`ManifestMismatch` unless there is one contiguous tensor for each of `metas`."""
    problems = [f"got {len(tensors)} tensors for {len(metas)} metas"] * (len(tensors) != len(metas))
    for meta, tensor in zip(metas, tensors, strict=False):
        if (tensor.dtype, tuple(tensor.shape)) != (meta.dtype, tuple(meta.shape)):
            problems.append(f"{meta}: got {tensor.dtype} {tuple(tensor.shape)}")
        elif not tensor.is_contiguous():
            problems.append(f"{meta}: got a strided tensor, expected a contiguous one")
    if problems:
        raise mismatch("cannot receive into these tensors", problems, "pass one for each meta")
