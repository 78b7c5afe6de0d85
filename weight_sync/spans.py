"""Which bytes of an arena belong to some of its tensors; both ends of a transport that carries bytes cut them alike."""

import numpy as np

from .arena import Range
from .manifest import Manifest

PART_BYTES = 64 << 20
"""Longest range, so that several can be under way at once."""


def spans_of(manifest: Manifest, indices: np.ndarray) -> list[Range]:
    """(start, stop) of the tensors `indices`: neighbours joined, then cut into parts of at most 64 MiB."""
    rows = np.sort(indices.astype(np.int64))
    if not len(rows):
        return []
    bounds = np.array((*manifest.offsets, manifest.arena_bytes), dtype=np.int64)
    breaks = np.flatnonzero(np.diff(rows) != 1) + 1
    starts = bounds[rows[np.concatenate(([0], breaks))]].tolist()
    ends = bounds[rows[np.concatenate((breaks - 1, [len(rows) - 1]))] + 1].tolist()
    return [
        (first, min(first + PART_BYTES, end))
        for start, end in zip(starts, ends, strict=True)
        for first in range(start, end, PART_BYTES)
    ]
