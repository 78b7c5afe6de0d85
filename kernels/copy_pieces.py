"""The pieces that a copy table is made of: from where to where, and in which dtypes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from . import fingerprint as fp

MAX_DIMS = 4
"""Dimensions of a piece, once neighbouring ones are joined."""
CASTS = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes among which a table casts; it moves any of up to 8 bytes."""

Strides = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """What goes from one place to another; made by `make_piece`."""

    source: int
    """Which allocation is read."""
    source_offset: int
    """First byte there."""
    target: int
    """Which allocation is written; not read where the table only sums."""
    target_offset: int
    """First byte there."""
    sizes: tuple[int, ...]
    """Elements along at most `MAX_DIMS` dimensions."""
    source_strides: Strides
    """Elements, one per dimension."""
    target_strides: Strides
    """Likewise."""
    source_dtype: torch.dtype
    """What is read."""
    target_dtype: torch.dtype
    """What is written, and summed."""
    output: int = -1
    """Which sum it adds to; below 0: none."""
    start: int = 0
    """Element of the full tensor at which the first one sits; of interest to its sum alone."""
    place_strides: Strides = ()
    """Strides in the full tensor."""


def make_piece(
    *,
    shape: Sequence[int],
    source_strides: Sequence[int],
    target_strides: Sequence[int],
    source_dtype: torch.dtype,
    target_dtype: torch.dtype,
    source: int = 0,
    source_offset: int = 0,
    target: int = 0,
    target_offset: int = 0,
    output: int = -1,
    start: int = 0,
    place_strides: Sequence[int] | None = None,
) -> Piece | None:
    """A piece with its dimensions joined, or None for what a table cannot do: other casts, more than `MAX_DIMS`.

    `place_strides`: where elements sit in the full tensor whose sum is wanted; None: as the target has them.
    """
    if target_dtype.itemsize > fp.WORD_BYTES or (
        source_dtype != target_dtype and not (source_dtype in CASTS and target_dtype in CASTS)
    ):
        return None
    places = target_strides if place_strides is None else place_strides
    dims = _join(shape, source_strides, target_strides, places)
    if len(dims) > MAX_DIMS:
        return None
    columns = list(zip(*dims, strict=True)) or [(), (), (), ()]
    return Piece(
        source=source,
        source_offset=source_offset,
        target=target,
        target_offset=target_offset,
        sizes=columns[0],
        source_strides=columns[1],
        target_strides=columns[2],
        source_dtype=source_dtype,
        target_dtype=target_dtype,
        output=output,
        start=start,
        place_strides=columns[3],
    )


def _join(shape: Sequence[int], *strides: Sequence[int]) -> list[tuple[int, ...]]:
    """(size, stride, stride, ...) per dimension, outermost first, as few as describe the same elements."""
    dims: list[tuple[int, ...]] = []
    for size, *here in zip(shape, *strides, strict=True):
        if size == 1:
            continue
        if dims and all(
            outer == inner * size for outer, inner in zip(dims[-1][1:], here, strict=True)
        ):
            dims[-1] = (dims[-1][0] * size, *here)
        else:
            dims.append((size, *here))
    return dims or [(math.prod(shape), *(1 for _ in strides))]
