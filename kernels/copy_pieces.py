"""The pieces that a copy table is made of: from where to where, and in which dtypes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch

from . import fingerprint as fp

MAX_DIMS = 4
"""Dimensions of a piece, once neighbouring ones are joined."""
CASTS = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes among which a table casts; it moves any of up to 8 bytes."""

_EXPONENTS = {
    torch.float64: 0x7FF0_0000_0000_0000,
    torch.float32: 0x7F80_0000,
    torch.bfloat16: 0x7F80,
    torch.float16: 0x7C00,
    torch.float8_e5m2: 0x7C,
    torch.float8_e4m3fn: 0x7F,  # its NaN; it has no infinities
}
"""Bits that are all set in a number that is not finite."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class WholePieces:
    """`W` pieces in columns, each all of an allocation from its first byte on: contiguous at both ends, and not cast.

    As a rule almost all of thousands of tensors are such, and an object for each takes longer than to read its bytes.
    """

    sources: torch.Tensor
    """Which allocation each reads, (W,) int64, as all columns, on the CPU."""
    target_offsets: torch.Tensor
    """First byte in the first allocation that is written; not read where the table only sums."""
    num_elements: torch.Tensor
    """Of each."""
    outputs: torch.Tensor
    """Which sum each adds to; below 0: none."""
    kinds: torch.Tensor
    """Its dtype, as a position in `dtypes`."""
    dtypes: tuple[torch.dtype, ...]
    """Of at most 8 bytes."""

    @property
    def num_bytes(self) -> torch.Tensor:
        """Of each, (W,)."""
        sizes = [dtype.itemsize for dtype in self.dtypes]
        return self.num_elements * torch.tensor(sizes, dtype=torch.int64)[self.kinds]

    def runs(
        self, sources: torch.Tensor, targets: torch.Tensor, *, copy: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Those that start on a word at both ends as (R, 6): source, offset, target, offset, bytes, output; and numbers
        of those that do not. sources, targets: addresses, int64."""
        at = sources[self.sources]
        if copy:
            at = at | (targets[0] + self.target_offsets)
        num_bytes, none = self.num_bytes, torch.zeros_like(self.sources)
        columns = (self.sources, none, none, self.target_offsets, num_bytes, self.outputs)
        fits = at % fp.WORD_BYTES == 0
        runs = torch.stack(columns, dim=1)[fits & (num_bytes > 0)]
        return runs, torch.nonzero(~fits).flatten()

    def pieces(self, numbers: torch.Tensor) -> Iterator[Piece]:
        """Some of them."""
        columns = (self.sources, self.target_offsets, self.num_elements, self.outputs, self.kinds)
        held = (column[numbers].tolist() for column in columns)
        for source, target_offset, size, output, kind in zip(*held, strict=True):
            yield Piece(
                source=source,
                source_offset=0,
                target=0,
                target_offset=target_offset,
                sizes=(size,),
                source_strides=(1,),
                target_strides=(1,),
                source_dtype=self.dtypes[kind],
                target_dtype=self.dtypes[kind],
                output=output,
                place_strides=(1,),
            )


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


@cache
def exponent_of(dtype: torch.dtype) -> tuple[int, int]:
    """Bits that are all set in a number that is not finite, in each number of a word (int64); and 1 where they are not
    known. Integers have none."""
    if not dtype.is_floating_point:
        return 0, 0
    mask = _EXPONENTS.get(dtype, 0)
    bits = range(0, 64, 8 * dtype.itemsize)
    return fp.signed(sum(mask << at for at in bits)), int(not mask)


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
