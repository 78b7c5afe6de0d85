"""How announced tensors travel: in chunks of whole tensors, which are sent as ranges of bytes.

Both ends of a transport that carries bytes cut alike, from the manifest and the announced tensors alone.
"""

from collections.abc import Iterator

import numpy as np

from ..layout.manifest import Manifest
from ..layout.memory import Range

CHUNK_BYTES = 256 << 20
"""What a receiver takes in at once; a larger tensor is a chunk of its own."""
PART_BYTES = 64 << 20
"""Longest range, so that several can be under way at once."""


def chunks_of(manifest: Manifest, indices: np.ndarray) -> list[np.ndarray]:
    """The tensors `indices` in the order of the arena, in as few chunks as `CHUNK_BYTES` allows; each ascending."""
    rows = np.sort(indices.astype(np.int64))
    sizes = np.diff(_bounds(manifest))[rows]
    ends = np.cumsum(sizes)
    chunks, first = [], 0
    while first < len(rows):
        limit = ends[first] - sizes[first] + CHUNK_BYTES
        last = max(first + 1, int(np.searchsorted(ends, limit, side="right")))
        chunks.append(rows[first:last])
        first = last
    return chunks


def ranges_of(manifest: Manifest, indices: np.ndarray) -> list[Range]:
    """(start, stop) of the tensors `indices` in the arena, chunk by chunk: neighbours joined, then cut into parts."""
    bounds = _bounds(manifest)
    return [one for rows in chunks_of(manifest, indices) for one in _ranges(bounds, rows)]


def ranges_of_chunk(manifest: Manifest, rows: np.ndarray) -> list[Range]:
    """(start, stop) of each range of one chunk in the arena; `rows` ascending."""
    return list(_ranges(_bounds(manifest), rows))


def lengths_of(manifest: Manifest, rows: np.ndarray) -> list[int]:
    """Bytes of each range of one chunk."""
    return [stop - start for start, stop in _ranges(_bounds(manifest), rows)]


def _bounds(manifest: Manifest) -> np.ndarray:
    return np.array((*manifest.offsets, manifest.arena_bytes), dtype=np.int64)


def _ranges(bounds: np.ndarray, rows: np.ndarray) -> Iterator[Range]:
    breaks = np.flatnonzero(np.diff(rows) != 1) + 1
    starts = bounds[rows[np.concatenate(([0], breaks))]].tolist()
    ends = bounds[rows[np.concatenate((breaks - 1, [len(rows) - 1]))] + 1].tolist()
    for start, end in zip(starts, ends, strict=True):
        for first in range(start, end, PART_BYTES):
            yield first, min(first + PART_BYTES, end)
