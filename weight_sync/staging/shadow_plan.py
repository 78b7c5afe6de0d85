"""The way of an update through a shadow: from chunks of an arena into it, and from it into the parameters."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

import numpy as np
import torch

from ..layout import region as regions
from ..layout.encoding import Encoding
from ..layout.fingerprints import ArenaFingerprints
from ..layout.manifest import Manifest
from ..layout.memory import byte_range, storage_key
from ..plan.copies import Copy, Occupied
from ..plan.decoding import decoder_of
from ..plan.plan import PlacedSums, Plan
from ..transports.chunks import lengths_of
from .shadow import Shadow, ShadowWrite
from .stage import as_uint64

_CACHED_ARENAS = 4
_CACHED_SUBSETS = 16


class ShadowPlan:
    """A plan by way of the shadow, and the chunks of it that came lately."""

    def __init__(self, plan: Plan, shadow: Shadow) -> None:
        self._manifest = plan.manifest
        self._encoding = plan.encoding
        self._shadow = shadow
        self._occupied = shadow.occupied()
        self._copies: defaultdict[int, list[Copy]] = defaultdict(list)
        for copy in plan.copies:
            self._copies[copy.index].append(copy)
        self._placements = plan.placements
        self._sums: PlacedSums | None = None
        self._last: ShadowWrite | None = None
        self._all: ShadowWrite | None = None
        self._some: OrderedDict[bytes, ShadowWrite] = OrderedDict()
        self._chunks: OrderedDict[bytes, Chunk] = OrderedDict()
        self._chunk_bytes = 0

    def chunk(self, rows: np.ndarray) -> Chunk:
        """The chunk of these tensors, ascending."""
        key = rows.tobytes()
        chunk = self._chunks.get(key)
        if chunk is None:
            chunk = self._chunks[key] = Chunk(
                self._manifest, rows, self._copies, self._shadow, self._occupied, self._encoding
            )
            self._chunk_bytes += chunk.manifest.arena_bytes
            while self._chunk_bytes > _CACHED_ARENAS * self._manifest.arena_bytes:
                self._chunk_bytes -= self._chunks.popitem(last=False)[1].manifest.arena_bytes
        self._chunks.move_to_end(key)
        return chunk

    def summands(self, rows: np.ndarray | None) -> np.ndarray:
        """Of the fingerprints of these tensors (None: all), the parts that are in the shadow; (N,) uint64."""
        if self._sums is None:
            self._sums = PlacedSums(
                [
                    [
                        replace(part, destination=self._shadow.of(part.destination))
                        for part in parts
                        if part.destination.numel()  # other ranks have the others
                    ]
                    for parts in self._placements
                ]
            )
        return as_uint64(self._sums.values(rows))

    @torch.no_grad()
    def write(self, rows: np.ndarray | None) -> None:
        """From the shadow into the parameters."""
        self._last = None  # of an older session, whose bytes are in the shadow no longer
        self._last = self._everything() if rows is None else self._subset(rows)
        self._last.run()

    def can_take_back(self) -> bool:
        """What was resident before the last write is in the shadow now, or still resident."""
        return self._last is None or self._last.reversible

    def take_back(self) -> None:
        """Make it resident again."""
        if self._last is not None:
            self._last.take_back()

    def _everything(self) -> ShadowWrite:
        # Not before it is needed: until then the parameters' memory may be released.
        if self._all is None:
            self._all = self._write_of(range(len(self._manifest.tensors)))
        return self._all

    def _subset(self, rows: np.ndarray) -> ShadowWrite:
        key = rows.tobytes()
        if key not in self._some:
            self._some[key] = self._write_of(rows.tolist())
            if len(self._some) > _CACHED_SUBSETS:
                self._some.popitem(last=False)
        self._some.move_to_end(key)
        return self._some[key]

    def _write_of(self, rows: Iterable[int]) -> ShadowWrite:
        return self._shadow.write(copy.destination for row in rows for copy in self._copies[row])


class Chunk:
    """Whole tensors of a manifest that are received together, one behind the other in a receive buffer."""

    def __init__(
        self,
        manifest: Manifest,
        rows: np.ndarray,
        copies: Mapping[int, Sequence[Copy]],
        shadow: Shadow,
        occupied: Occupied,
        encoding: Encoding,
    ) -> None:
        self.rows = rows
        """Which tensors, (N,) int64, ascending."""
        self.manifest = Manifest(
            tensors=tuple(manifest.tensors[row] for row in rows.tolist()),
            bucket_bytes=manifest.bucket_bytes,
        )
        """How they lie in the receive buffer."""
        ends = list(accumulate(lengths_of(manifest, rows), initial=0))
        self.ranges = list(pairwise(ends))
        """The ranges of the receive buffer that travel as one each."""
        self._fingerprints = ArenaFingerprints(self.manifest)
        moved = [
            Copy(
                index=i,
                region=copy.region,
                destination=shadow.of(copy.destination),
                resident=copy.resident,
            )
            for i, row in enumerate(rows.tolist())
            for copy in copies[row]
        ]
        self._decoder = decoder_of(encoding, self.manifest, moved, occupied)
        self.home = self._find_home(moved, shadow, occupied) if encoding.verbatim else None
        """Memory of the shadow that has the layout of the receive buffer, and can be it; or None."""

    def fingerprints(self, incoming: torch.Tensor) -> np.ndarray:
        """One per tensor, (N,) uint64."""
        return as_uint64(self._fingerprints.values(incoming))

    def move(self, incoming: torch.Tensor) -> None:
        """Into the shadow: this rank's parts, at their places."""
        if self.home is None:
            self.take(incoming)

    def take(self, source: torch.Tensor) -> None:
        """The same out of memory that has the layout of a receive buffer, and is none: nothing else is read of it."""
        self._decoder.run(source, None)

    def _find_home(
        self, moved: Sequence[Copy], shadow: Shadow, occupied: Occupied
    ) -> torch.Tensor | None:
        """All tensors are in the shadow, whole, as far from each other as here, and nothing else is in between."""
        filled = [i for i, meta in enumerate(self.manifest.tensors) if meta.num_bytes]
        if not filled or [copy.index for copy in moved] != filled:
            return None
        first = byte_range(moved[0].destination)[0] - self.manifest.offsets[filled[0]]
        for copy in moved:
            whole = regions.whole(self.manifest.tensors[copy.index].shape)
            at = byte_range(copy.destination)[0] - self.manifest.offsets[copy.index]
            if at != first or copy.region != whole or not copy.destination.is_contiguous():
                return None
        held = occupied[storage_key(moved[0].destination)]
        end = first + self.manifest.arena_bytes
        low, high = bisect_right(held, first, key=lambda r: r[1]), bisect_left(held, (end, 0))
        if high - low != len(filled):
            return None
        return shadow.room(moved[0].destination, first, self.manifest.arena_bytes)
