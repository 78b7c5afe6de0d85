"""One tensor that stands for several canonical ones: rows of q, k and v, or the stacked matrices of experts."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated

import msgspec
import torch

from . import region as regions
from .manifest import MAX_ARENA_BYTES, MAX_DIMS, MAX_NAME_LENGTH, MAX_TENSORS
from .region import Region

Name = Annotated[str, msgspec.Meta(max_length=MAX_NAME_LENGTH)]
Sizes = Annotated[
    tuple[Annotated[int, msgspec.Meta(ge=0, lt=MAX_ARENA_BYTES)], ...],
    msgspec.Meta(max_length=MAX_DIMS),
]


class Fused(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A shape, tiled by parts. A part with fewer dimensions counts as one of size 1 in each of the first ones."""

    shape: Sizes
    """Of the whole."""
    parts: Annotated[tuple[Name, ...], msgspec.Meta(max_length=MAX_TENSORS)]
    """Canonical names of what it is made of."""
    starts: Annotated[tuple[Sizes, ...], msgspec.Meta(max_length=MAX_TENSORS)]
    """For each part where its first element is in the whole."""

    @classmethod
    def joined(cls, parts: Mapping[str, Sequence[int]], dim: int = 0) -> Fused:
        """Parts (name, shape) side by side along `dim`."""
        shape = list(next(iter(parts.values())))
        starts = []
        first = 0
        for sizes in parts.values():
            starts.append(tuple(first if d == dim else 0 for d in range(len(shape))))
            first += sizes[dim]
        shape[dim] = first
        return cls(shape=tuple(shape), parts=tuple(parts), starts=tuple(starts))

    @classmethod
    def stacked(cls, layers: Sequence[Fused]) -> Fused:
        """Wholes of one shape, each at its index along a new first dimension."""
        return cls(
            shape=(len(layers), *layers[0].shape),
            parts=tuple(itertools.chain.from_iterable(layer.parts for layer in layers)),
            starts=tuple((i, *start) for i, layer in enumerate(layers) for start in layer.starts),
        )

    def region(self, i: int, part: Region) -> Region:
        """Where the region `part` of part `i` is in the whole."""
        start = self.starts[i]
        new = len(start) - len(part)
        inner = tuple(
            (first + a, first + b) for first, (a, b) in zip(start[new:], part, strict=True)
        )
        return tuple((first, first + 1) for first in start[:new]) + inner

    def lifted(self, part: torch.Tensor) -> torch.Tensor:
        """`part`, or a region of it, as a view with as many dimensions as the whole."""
        return part[(None,) * (len(self.shape) - part.dim())]

    def view(self, whole: torch.Tensor, i: int, shape: Sequence[int]) -> torch.Tensor:
        """Part `i`, which has `shape`, as a view of `whole`."""
        strides = whole.stride()
        offset = whole.storage_offset() + sum(map(operator.mul, self.starts[i], strides))
        return whole.as_strided(shape, strides[len(strides) - len(shape) :], offset)

    def problems(self, shapes: Mapping[str, Sequence[int]]) -> Iterator[str]:
        """Why parts of these shapes do not tile the whole: each element of it is of one part."""
        if len(self.parts) != len(self.starts) or not self.parts:
            yield f"got {len(self.parts)} parts at {len(self.starts)} places, expected one for each"
            return
        placed: list[Region] = []
        for i, name in enumerate(self.parts):
            sizes = shapes[name]
            if len(self.starts[i]) != len(self.shape) or len(sizes) > len(self.shape):
                yield f"got {name} of {list(sizes)}, expected at most {len(self.shape)} dimensions"
                return
            placed.append(self.region(i, regions.whole(sizes)))
            if not regions.inside(placed[-1], self.shape):
                yield f"got {name} of {list(sizes)} outside of {list(self.shape)}"
                return
        total = sum(math.prod(regions.sizes(part)) for part in placed)
        overlap = next(regions.overlapping(placed), None)
        if overlap is not None:
            yield f"got parts over each other at {overlap[0]} and {overlap[1]}"
        elif total != math.prod(self.shape):
            yield f"got parts of {total} elements, expected {math.prod(self.shape)} for {list(self.shape)}"
