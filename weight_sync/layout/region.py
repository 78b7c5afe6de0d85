"""Rectangular parts of a tensor, and the runs of bytes that they are in its flat order."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch

Region = tuple[tuple[int, int], ...]
"""Half-open ranges, one per dimension; empty for a scalar."""


def whole(shape: Sequence[int]) -> Region:
    """The region that is all of a tensor."""
    return tuple((0, size) for size in shape)


def sizes(region: Region) -> tuple[int, ...]:
    """Shape of a part."""
    return tuple(stop - start for start, stop in region)


def inside(region: Region, shape: Sequence[int]) -> bool:
    """Whether `region` is a part of a tensor of `shape`."""
    return len(region) == len(shape) and all(
        0 <= start <= stop <= size for (start, stop), size in zip(region, shape, strict=True)
    )


def overlap(a: Region, b: Region) -> bool:
    """Whether two parts of one tensor share an element; two scalars do."""
    return all(max(a0, b0) < min(a1, b1) for (a0, a1), (b0, b1) in zip(a, b, strict=True))


def common(a: Region, b: Region) -> Region | None:
    """What two parts of one tensor share, or None where that is no element; two scalars share theirs."""
    shared = tuple((max(a0, b0), min(a1, b1)) for (a0, a1), (b0, b1) in zip(a, b, strict=True))
    return shared if all(start < stop for start, stop in shared) else None


def counted_from(region: Region, origin: Region) -> Region:
    """The part `region` of a tensor as a part of its part `origin`, in which it lies."""
    return tuple(
        (start - first, stop - first)
        for (start, stop), (first, _) in zip(region, origin, strict=True)
    )


def overlapping(parts: Sequence[Region]) -> Iterator[tuple[Region, Region]]:
    """Those of one tensor's parts that share an element, in pairs."""
    # Sorted by their first row, only neighbours until the first gap can overlap.
    filled = sorted(part for part in parts if math.prod(sizes(part)))
    for i, a in enumerate(filled):
        for b in itertools.islice(filled, i + 1, None):
            if a and b[0][0] >= a[0][1]:
                break
            if overlap(a, b):
                yield a, b


def part(tensor: torch.Tensor, region: Region) -> torch.Tensor:
    """The part as a view of `tensor`."""
    for dim, (start, stop) in enumerate(region):
        if (start, stop) != (0, tensor.shape[dim]):
            tensor = tensor.narrow(dim, start, stop - start)
    return tensor


def runs(shape: Sequence[int], region: Region, itemsize: int) -> tuple[torch.Tensor, int]:
    """Where the part's elements, in order, lie in the bytes of a contiguous tensor of `shape`.

    Returns the first byte of every run (int64, on the CPU) and the bytes of each; all runs are equally long, and runs
    that follow each other are joined. An empty part is one empty run.
    """
    lengths = sizes(region)
    if math.prod(lengths) == 0:
        return torch.zeros(1, dtype=torch.int64), 0
    outer = len(shape)
    while outer and lengths[outer - 1] == shape[outer - 1]:
        outer -= 1
    # Dimensions from `outer` on are taken whole; the one before is cut, and ends what is contiguous.
    inner = math.prod(shape[outer:]) * itemsize
    starts = torch.zeros(1, dtype=torch.int64)
    if not outer:
        return starts, inner
    run_bytes = lengths[outer - 1] * inner
    stride = inner
    starts = starts + region[outer - 1][0] * stride
    for dim in range(outer - 2, -1, -1):
        stride *= shape[dim + 1]
        first, stop = region[dim]
        starts = (torch.arange(first, stop)[:, None] * stride + starts).flatten()
    return starts, run_bytes
