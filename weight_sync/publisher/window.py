"""An arena that holds two buckets instead of the model, filled and read in turn.

While the engine takes what is in one half into memory of its own, the trainer packs the other. Tensors lie one behind
the other from the beginning of a half on, in the order of the manifest.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch

from ..errors import TransportError
from ..layout.fingerprints import ArenaFingerprints
from ..layout.finite import FiniteCheck
from ..layout.manifest import ALIGNMENT, Manifest, align
from ..layout.parallel_copy import copy_tensors
from .packer import DevicePacker

_KEPT = 256


class WindowPart:
    """Some tensors in one half."""

    def __init__(self, manifest: Manifest, buffer: torch.Tensor, at: int) -> None:
        self.at = at
        """Byte of the arena at which they begin."""
        self._manifest = manifest
        self._buffer = buffer[at : at + manifest.arena_bytes]
        self._fingerprints = ArenaFingerprints(manifest)
        self._views = manifest.views(self._buffer)
        self._packer = (
            DevicePacker(manifest, self._buffer, self._fingerprints) if buffer.is_cuda else None
        )
        self._finite = FiniteCheck(manifest)
        self._everything = np.arange(len(manifest.tensors), dtype=np.int64)
        self._suspects = self._everything

    def pack(self, sources: Sequence[torch.Tensor], *, check_finite: bool) -> np.ndarray:
        """Copy all of them here; their fingerprints (N,) uint64. `check_finite`: whether that is asked for then."""
        if self._packer is not None:
            values, self._suspects = self._packer.pack(
                self._everything, sources, check_finite=check_finite
            )
            return values
        copy_tensors(self._views, list(sources))
        return self.read()

    def read(self) -> np.ndarray:
        """The fingerprints of what lies here."""
        self._suspects = self._everything
        return self._fingerprints.values(self._buffer).numpy().view(np.uint64)

    def check_finite(self) -> None:
        """`NonFiniteWeightsError` when what lies here has NaN or infinite values."""
        self._finite.check(self._buffer, self._suspects)


class Window:
    """Both halves of an arena, in turn."""

    def __init__(self, manifest: Manifest, buffer: torch.Tensor) -> None:
        """`TransportError` where a tensor does not fit a half."""
        self._manifest = manifest
        self._buffer = buffer
        self._half = half_bytes(manifest, buffer.numel())
        self._which = 0
        self._places: OrderedDict[tuple[int, tuple[int, ...]], WindowPart] = OrderedDict()

    def split(self, rows: Sequence[int]) -> list[list[int]]:
        """Ascending rows in runs that fit a half each."""
        runs: list[list[int]] = []
        used = self._half
        for row in rows:
            size = align(self._manifest.tensors[row].num_bytes)
            if not runs or used + size > self._half:
                runs.append([])
                used = 0
            runs[-1].append(row)
            used += size
        return runs

    def turn(self) -> None:
        """Use the other half from now on; whoever has read it must be done."""
        self._which = 1 - self._which

    def place(self, rows: Sequence[int]) -> WindowPart:
        """Ascending rows that fit, in the present half."""
        key = self._which, tuple(rows)
        place = self._places.get(key)
        if place is None:
            manifest = Manifest(
                tensors=tuple(self._manifest.tensors[row] for row in rows),
                bucket_bytes=self._manifest.bucket_bytes,
            )
            place = self._places[key] = WindowPart(manifest, self._buffer, self._which * self._half)
            if len(self._places) > _KEPT:
                self._places.popitem(last=False)
        return place

    def fits_behind(self, rows: Sequence[int], row: int) -> bool:
        """Whether `row` can follow `rows` in a half."""
        held = sum(align(self._manifest.tensors[i].num_bytes) for i in rows)
        after = not rows or row > rows[-1]
        return after and held + align(self._manifest.tensors[row].num_bytes) <= self._half

    def write(self, rows: Sequence[int], row: int, source: torch.Tensor) -> None:
        """Copy one tensor to where it lies when it follows `rows` in the present half."""
        meta = self._manifest.tensors[row]
        start = self._which * self._half
        start += sum(align(self._manifest.tensors[i].num_bytes) for i in rows)
        raw = self._buffer[start : start + meta.num_bytes]
        with torch.no_grad():
            raw.view(meta.dtype).view(meta.shape).copy_(source)


def half_bytes(manifest: Manifest, arena_bytes: int) -> int:
    """Bytes of one half of an arena; `TransportError` where the largest tensor does not fit."""
    half = arena_bytes // 2 // ALIGNMENT * ALIGNMENT
    largest = max((align(meta.num_bytes) for meta in manifest.tensors), default=0)
    if largest > half:
        raise TransportError(
            f"the arena is too small: got arena_bytes={arena_bytes}, expected at least {2 * largest}, twice the "
            "largest tensor; raise it, or leave it out for an arena that holds the model"
        )
    return half
