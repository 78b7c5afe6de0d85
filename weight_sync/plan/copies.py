"""Copies out of an arena: neighbours at both ends joined into one range of bytes, the rest through strided views."""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rollout_kernels.copy_pieces import Piece, make_piece
from rollout_kernels.copy_table import CopyTable

from ..layout import region as regions
from ..layout.manifest import ALIGNMENT, Manifest
from ..layout.memory import Range, Storage, byte_range, joined, storage_key, storage_view
from ..layout.region import Region

Indices = Sequence[int] | np.ndarray
Occupied = Mapping[Storage, Sequence[Range]]

_CACHED_SUBSETS = 16
_LARGE_BYTES = 32 << 20
"""A range of a GPU that the driver copies by itself, 6 % faster than a table does (1,502 to 1,409 GB/s on an H100)."""


@torch.no_grad()
def copy_ranges(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """Copy few large pieces; on a GPU one by one, since torch moves bytes at half the rate when it takes many."""
    if not targets:
        return
    if targets[0].is_cuda and sum(to.nbytes for to in targets) >= len(targets) << 20:
        for to, source in zip(targets, sources, strict=True):
            to.copy_(source)
        return
    torch._foreach_copy_(list(targets), list(sources))


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """One row of a plan: a part of a tensor of the manifest, and where it goes."""

    index: int
    """The tensor's position in the manifest."""
    region: Region
    """Part of it."""
    destination: torch.Tensor
    """Memory of the part's shape, not empty."""
    resident: torch.Tensor
    """What serves in its place: the parameter's memory, which is `destination` itself unless that is a shadow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ByteRange:
    """Bytes that are contiguous at both ends."""

    index: int
    """The tensor's position in the manifest."""
    source: int
    """First byte in the arena."""
    storage: Storage
    """Allocation that they go to."""
    target: int
    """First byte there."""
    num_bytes: int
    """How many."""


class Replay:
    """The compiled copies of a plan: all of them, and those of subsets that were asked for lately."""

    def __init__(self, manifest: Manifest, copies: Sequence[Copy], occupied: Occupied) -> None:
        """`occupied`: all bytes of the model's tensors, sorted; only what lies between them may take padding."""
        self._manifest = manifest
        self._occupied = occupied
        self._memory = {
            storage_key(copy.destination): storage_view(copy.destination, torch.uint8)
            for copy in copies
        }
        self._ranges: list[ByteRange] = []
        self._strided: list[Copy] = []
        for copy in copies:
            found = _byte_range(manifest, copy)
            if found is None:
                self._strided.append(copy)
            else:
                self._ranges.append(found)
        self._all = self._compile(None)
        self._some: OrderedDict[bytes, _Batch] = OrderedDict()

    @torch.no_grad()
    def run(self, stage: torch.Tensor, present: Indices | None) -> None:
        """Copy from `stage` (uint8); only the tensors `present`, unless it is None."""
        batch = self._all if present is None else self._subset(present)
        if stage.is_cuda and batch.on_gpu:
            batch.launch(self._manifest, stage)
            return
        sources = [stage[first:last] for first, last in batch.sources]
        targets = batch.targets
        if batch.strided:
            targets = targets + [copy.destination for copy in batch.strided]
            sources += [
                regions.part(self._manifest.view(stage, copy.index), copy.region)
                for copy in batch.strided
            ]
        if targets:
            torch._foreach_copy_(targets, sources)

    def _subset(self, present: Indices) -> _Batch:
        wanted = np.unique(np.asarray(present, dtype=np.int64))
        key = wanted.tobytes()
        batch = self._some.get(key)
        if batch is None:
            batch = self._some[key] = self._compile(set(wanted.tolist()))
            if len(self._some) > _CACHED_SUBSETS:
                self._some.popitem(last=False)
        self._some.move_to_end(key)
        return batch

    @torch.inference_mode(False)
    def _compile(self, wanted: set[int] | None) -> _Batch:
        # What lies equally far from its source in one allocation may go together.
        alike: defaultdict[tuple[Storage, int], list[Range]] = defaultdict(list)
        for r in self._ranges:
            if wanted is None or r.index in wanted:
                alike[r.storage, r.target - r.source].append((r.source, r.source + r.num_bytes))
        copies = [
            (source, self._memory[storage][source[0] + distance : source[1] + distance])
            for (storage, distance), ranges in alike.items()
            for source in joined(sorted(ranges), _follows(self._occupied[storage], distance))
        ]
        copies.sort(key=lambda copy: copy[0])
        return _Batch(
            sources=[source for source, _ in copies],
            targets=[target for _, target in copies],
            strided=[copy for copy in self._strided if wanted is None or copy.index in wanted],
        )


@dataclass(slots=True, kw_only=True)
class _Batch:
    """What one call copies."""

    sources: list[tuple[int, int]]
    targets: list[torch.Tensor]
    strided: list[Copy]
    _table: DeviceCopies | None = None

    @property
    def on_gpu(self) -> bool:
        """It writes memory of a GPU."""
        return any(to.is_cuda for to in self.targets) or any(
            copy.destination.is_cuda for copy in self.strided
        )

    def launch(self, manifest: Manifest, stage: torch.Tensor) -> None:
        """All of it in a few launches, whatever its number."""
        if self._table is None or not self._table.fits(stage):
            self._table = DeviceCopies(manifest, stage, self.sources, self.targets, self.strided)
        self._table.run(stage)


class StorageTable:
    """Allocations by number, in the order in which they were first asked for."""

    def __init__(self) -> None:
        self._numbers: dict[int, int] = {}
        self._held: list[torch.UntypedStorage] = []

    def number(self, tensor: torch.Tensor) -> int:
        """Of the allocation of `tensor`."""
        storage = tensor.untyped_storage()
        number = self._numbers.setdefault(storage._cdata, len(self._held))
        if number == len(self._held):
            self._held.append(storage)
        return number

    def addresses(self) -> list[int]:
        """Asked for each time: memory that was released may have come back elsewhere. At least one, of nothing."""
        return [storage.data_ptr() for storage in self._held] or [0]


class DeviceCopies:
    """The copies of one batch out of a stage of a GPU, as a table; what a table cannot do goes through torch."""

    def __init__(
        self,
        manifest: Manifest,
        stage: torch.Tensor,
        ranges: Sequence[tuple[int, int]],
        targets: Sequence[torch.Tensor],
        strided: Sequence[Copy],
    ) -> None:
        self._manifest = manifest
        self._memory = StorageTable()
        self._odd: list[Copy] = []
        pieces: list[Piece] = []
        self._large: list[tuple[int, int, torch.Tensor]] = []
        for (first, last), to in zip(ranges, targets, strict=True):
            if last - first >= _LARGE_BYTES:
                self._large.append((first, last, to))
                continue
            piece = make_piece(
                shape=(last - first,),
                source_strides=(1,),
                target_strides=(1,),
                source_dtype=torch.uint8,
                target_dtype=torch.uint8,
                source_offset=first,
                target=self._memory.number(to),
                target_offset=int(to.storage_offset()),
            )
            assert piece is not None, "bytes to bytes"
            pieces.append(piece)
        for copy in strided:
            strided_piece = self._piece(copy)
            if strided_piece is None:
                self._odd.append(copy)
            else:
                pieces.append(strided_piece)
        self._table = CopyTable(
            pieces,
            sources=[stage.data_ptr()],
            targets=self._memory.addresses(),
            device=stage.device,
        )

    def fits(self, stage: torch.Tensor) -> bool:
        """Whether it can serve for this stage."""
        return self._table.device == stage.device and self._table.fits(
            [stage.data_ptr()], self._memory.addresses()
        )

    @torch.no_grad()
    def run(self, stage: torch.Tensor) -> None:
        """Issue the copies on the current stream."""
        for first, last, to in self._large:
            to.copy_(stage[first:last])
        self._table.run([stage.data_ptr()], self._memory.addresses())
        for copy in self._odd:
            part = regions.part(self._manifest.view(stage, copy.index), copy.region)
            copy.destination.copy_(part)

    def _piece(self, copy: Copy) -> Piece | None:
        meta, to = self._manifest.tensors[copy.index], copy.destination
        whole = torch.empty(meta.shape, dtype=meta.dtype, device="meta")
        part = regions.part(whole, copy.region)
        size = meta.dtype.itemsize
        return make_piece(
            shape=tuple(to.shape),
            source_strides=part.stride(),
            target_strides=to.stride(),
            source_dtype=meta.dtype,
            target_dtype=to.dtype,
            source_offset=self._manifest.offsets[copy.index] + int(part.storage_offset()) * size,
            target=self._memory.number(to),
            target_offset=int(to.storage_offset()) * size,
        )


def _byte_range(manifest: Manifest, copy: Copy) -> ByteRange | None:
    """The copy as one range of bytes at both ends, or None where either is strided."""
    if not copy.destination.is_contiguous():
        return None
    meta = manifest.tensors[copy.index]
    starts, run_bytes = regions.runs(meta.shape, copy.region, meta.dtype.itemsize)
    if len(starts) > 1:
        return None
    return ByteRange(
        index=copy.index,
        source=manifest.offsets[copy.index] + int(starts[0]),
        storage=storage_key(copy.destination),
        target=byte_range(copy.destination)[0],
        num_bytes=run_bytes,
    )


def _follows(occupied: Sequence[Range], distance: int) -> Callable[[int, int], bool]:
    """Whether bytes of an arena, and those `distance` further in an allocation, follow each other at once or after the
    same padding."""

    def follows(end: int, start: int) -> bool:
        aligned = start % ALIGNMENT == 0 and distance % ALIGNMENT == 0
        return end == start or (
            aligned and only_padding(occupied, end + distance, start + distance)
        )

    return follows


def only_padding(occupied: Sequence[Range], end: int, start: int) -> bool:
    """Whether less than a step of alignment lies between two bytes of an allocation, and no tensor of the model in it.

    occupied: the bytes of the model's tensors there, sorted; also of those that an update does not send.
    """
    if not 0 <= start - end < ALIGNMENT:
        return False
    at = bisect_left(occupied, (end, end))
    return occupied[at][0] >= start and (at == 0 or occupied[at - 1][1] <= end)
