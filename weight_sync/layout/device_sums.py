"""Fingerprints of many tensors of GPUs where they are, strided and cast ones too: a few launches for all of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch

from rollout_kernels.copy_pieces import Piece, make_piece
from rollout_kernels.copy_table import CopyTable

from .tensor_sums import unsigned

_ONE = (1,)
Held = tuple[torch.Tensor, torch.dtype]
"""A tensor, and the dtype in which its fingerprint is wanted."""


def device_sums(tensors: Sequence[Held]) -> list[int | None]:
    """The fingerprint of each, as if it were converted first; None for what is not on a GPU, or needs torch."""
    found: list[int | None] = [None] * len(tensors)
    by_device: defaultdict[torch.device, list[int]] = defaultdict(list)
    for i, (tensor, _) in enumerate(tensors):
        if tensor.is_cuda and not tensor.is_complex():
            by_device[tensor.device].append(i)
    for device, numbers in by_device.items():
        pieces: list[Piece] = []
        addresses: list[int] = []
        summed: list[int] = []
        for i in numbers:
            tensor, dtype = tensors[i]
            piece = _piece(tensor, dtype, len(summed))
            if piece is not None:
                pieces.append(piece)
                addresses.append(tensor.data_ptr())
                summed.append(i)
        table = CopyTable(
            pieces,
            sources=addresses,
            targets=(),
            device=device,
            num_outputs=len(summed),
            copy=False,
        )
        for i, value in zip(summed, table.run(addresses).tolist(), strict=True):
            found[i] = unsigned(value)
    return found


def _piece(tensor: torch.Tensor, dtype: torch.dtype, output: int) -> Piece | None:
    if tensor.dtype is dtype and dtype.itemsize <= 8 and tensor.is_contiguous():
        return Piece(  # what most of them are, without working it out
            source=output,
            source_offset=0,
            target=0,
            target_offset=0,
            sizes=(tensor.numel(),),
            source_strides=_ONE,
            target_strides=_ONE,
            source_dtype=dtype,
            target_dtype=dtype,
            output=output,
            place_strides=_ONE,
        )
    return make_piece(
        shape=tuple(tensor.shape),
        source_strides=tensor.stride(),
        target_strides=contiguous_strides(tensor.shape),
        source_dtype=tensor.dtype,
        target_dtype=dtype,
        source=output,
        output=output,
    )


def addresses_of(tensors: Sequence[torch.Tensor]) -> np.ndarray:
    """Where the first element of each is, (N,) uint64."""
    return np.fromiter(map(torch.Tensor.data_ptr, tensors), dtype=np.uint64, count=len(tensors))


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Of a contiguous tensor of `shape`."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(1, size)
    return tuple(reversed(strides))
