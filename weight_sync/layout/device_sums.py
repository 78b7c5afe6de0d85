"""Fingerprints of many tensors of GPUs where they are, strided and cast ones too: a few launches for all of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from operator import attrgetter

import numpy as np
import torch

from rollout_kernels.copy_pieces import Piece, WholePieces, make_piece
from rollout_kernels.copy_table import CopyTable

_IS_CUDA = attrgetter("is_cuda")


def device_sums(
    tensors: Sequence[torch.Tensor], dtypes: Sequence[torch.dtype]
) -> tuple[np.ndarray, np.ndarray]:
    """Fingerprints of tensors as if each were converted to its dtype in `dtypes` first: which of them, (M,) int64, and
    the value of each, (M,) uint64. Those that are missing are not on a GPU, or need torch."""
    by_device: defaultdict[int, list[int]] = defaultdict(list)
    for i, is_cuda in enumerate(map(_IS_CUDA, tensors)):
        if is_cuda:
            by_device[tensors[i].get_device()].append(i)
    numbers, values = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)]
    for held in by_device.values():
        listed = PieceList()
        summed = [i for i in held if listed.add(tensors[i], dtypes[i])]
        addresses = torch.from_numpy(addresses_of([tensors[i] for i in summed]).view(np.int64))
        table = listed.table(addresses, (), tensors[held[0]].device, copy=False)
        numbers.append(np.array(summed, dtype=np.int64))
        values.append(table.run(addresses).cpu().numpy())
    return np.concatenate(numbers), np.concatenate(values).view(np.uint64)


class PieceList:
    """Tensors that a table is to read, one allocation and one sum each; most of them in columns."""

    def __init__(self) -> None:
        self._pieces: list[Piece] = []
        self._whole: list[int] = []  # Four each: as many tuples are work for the collector.
        self._kinds: dict[torch.dtype, int] = {}
        self._num = 0

    def add(
        self,
        tensor: torch.Tensor,
        dtype: torch.dtype,
        target_offset: int = 0,
    ) -> bool:
        """Sum `tensor` as `dtype`, and write it contiguously from the byte `target_offset` of the target on. False for
        what a table cannot do, which gets no number."""
        # What stands for its conjugate or its negative is not what is in memory; torch knows.
        if tensor.is_complex() or tensor.is_neg():
            return False
        if tensor.dtype is dtype and tensor.is_contiguous() and dtype.itemsize <= 8:
            kind = self._kinds.setdefault(dtype, len(self._kinds))
            self._whole += (self._num, target_offset, tensor.numel(), kind)
        else:
            shape = tuple(tensor.shape)
            piece = make_piece(
                shape=shape,
                source_strides=tensor.stride(),
                target_strides=contiguous_strides(shape),
                source_dtype=tensor.dtype,
                target_dtype=dtype,
                source=self._num,
                target_offset=target_offset,
                output=self._num,
            )
            if piece is None:
                return False
            self._pieces.append(piece)
        self._num += 1
        return True

    def table(
        self,
        sources: torch.Tensor,
        targets: Sequence[int],
        device: torch.device,
        *,
        copy: bool,
    ) -> CopyTable:
        """What does it. sources: addresses of what was added, (M,) int64."""
        columns = torch.from_numpy(np.array(self._whole, dtype=np.int64).reshape(-1, 4).T)
        return CopyTable(
            self._pieces,
            sources=sources,
            targets=targets,
            device=device,
            num_outputs=self._num,
            copy=copy,
            whole=WholePieces(
                sources=columns[0],
                target_offsets=columns[1],
                num_elements=columns[2],
                outputs=columns[0],
                kinds=columns[3],
                dtypes=tuple(self._kinds),
            ),
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
