"""One rank's share of an update that all ranks of a trainer publish together: what it copies, and what it counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from rollout_kernels.span_table import ByteSpan, SpanTable, part_sum

from ..layout import region as regions
from ..layout.finite import refuse_non_finite
from ..layout.region import Region
from ..layout.shards import HeldRegion
from ..publisher.selection import Layout
from .plan import COMPARE, WRITE, buckets_of, parts_of


@dataclass(slots=True)
class _Bucket:
    """One rank's share of one bucket."""

    rows: int
    names: list[str] = field(default_factory=list)
    targets: list[torch.Tensor] = field(default_factory=list)
    sources: list[tuple[int, Region]] = field(default_factory=list)
    spans: list[ByteSpan] = field(default_factory=list)
    exact: list[tuple[int, int, torch.Tensor, int]] = field(default_factory=list)
    """Number of the source, output, and the runs, where a table cannot read the arena."""
    table: SpanTable | None = None


class RankShare:
    """What one rank copies and counts, compiled once and used in every update under the same plan."""

    def __init__(
        self,
        layout: Layout,
        tensors: Sequence[tuple[str, Sequence[HeldRegion]]],
        *,
        rows: np.ndarray,
        actions: bytes,
        buffer: torch.Tensor,
        skip: frozenset[str] = frozenset(),
    ) -> None:
        manifest = layout.manifest
        held = [(name, [piece.region for piece in pieces]) for name, pieces in tensors]
        self._words = buffer[: manifest.arena_bytes].view(torch.int64)
        self._dtypes = layout.dtypes
        self._buckets: list[_Bucket] = []
        self._compared: list[tuple[int, Region, int, torch.Tensor, int]] = []
        place: dict[int, tuple[_Bucket, int]] = {}
        for bucket_rows in buckets_of(manifest, rows):
            bucket = _Bucket(len(bucket_rows))
            self._buckets.append(bucket)
            place.update({int(row): (bucket, i) for i, row in enumerate(bucket_rows)})
        for part, action in zip(parts_of(layout, held, skip), actions, strict=True):
            local = _offset(tensors[part.item][1][part.piece].local, part.inner)
            meta = manifest.tensors[part.row]
            starts, run_bytes = regions.runs(meta.shape, part.region, meta.dtype.itemsize)
            if action == COMPARE:
                self._compared.append((part.item, local, part.row, starts, run_bytes))
            if action != WRITE:
                continue
            bucket, output = place[part.row]
            bucket.names.append(tensors[part.item][0])
            bucket.targets.append(regions.part(manifest.view(buffer, part.row), part.region))
            bucket.sources.append((part.item, local))
            start = int(starts[0])
            span = ByteSpan(
                offset=manifest.offsets[part.row] + start,
                num_bytes=run_bytes,
                output=output,
                start=start,
            )
            if len(starts) == 1 and span.fits_rows():
                bucket.spans.append(span)
            else:
                bucket.exact.append((len(bucket.sources) - 1, output, starts, run_bytes))
        for bucket in self._buckets:
            if bucket.spans:
                bucket.table = SpanTable(
                    bucket.spans, num_outputs=bucket.rows, device=buffer.device
                )

    @property
    def num_buckets(self) -> int:
        """How many `write` takes."""
        return len(self._buckets)

    @property
    def num_bytes(self) -> int:
        """Bytes that this rank writes."""
        return sum(target.nbytes for bucket in self._buckets for target in bucket.targets)

    @torch.no_grad()
    def write(self, number: int, tensors: Sequence[torch.Tensor]) -> np.ndarray:
        """Copy this rank's parts of a bucket into the arena; their summands, one per row of the bucket, uint64."""
        bucket = self._buckets[number]
        sources = [
            _flattened(regions.part(tensors[item], local), target.dim())
            for (item, local), target in zip(bucket.sources, bucket.targets, strict=True)
        ]
        if sources:
            torch._foreach_copy_(bucket.targets, sources)
        values = torch.zeros(bucket.rows, dtype=torch.int64)
        if bucket.table is not None:
            values += bucket.table.sums(self._words).cpu()
        for source, output, starts, run_bytes in bucket.exact:
            held = sources[source].to(bucket.targets[source].dtype)
            values[output] += part_sum(held, starts, run_bytes).cpu()
        return values.numpy().view(np.uint64)

    def check_finite(self, number: int) -> None:
        """`NonFiniteWeightsError` when what `write` has just copied has NaN or infinite values."""
        bucket = self._buckets[number]
        refuse_non_finite(zip(bucket.names, bucket.targets, strict=True))

    @torch.no_grad()
    def compare(self, tensors: Sequence[torch.Tensor]) -> np.ndarray:
        """Summands of the parts that are only compared, one each, uint64."""
        values = torch.zeros(len(self._compared), dtype=torch.int64)
        for number, (item, local, row, starts, run_bytes) in enumerate(self._compared):
            held = regions.part(tensors[item], local).to(self._dtypes[row])
            values[number] = part_sum(held, starts, run_bytes).cpu()
        return values.numpy().view(np.uint64)


def _flattened(part: torch.Tensor, num_dims: int) -> torch.Tensor:
    """Without the first dimensions, which are of size 1, where a part of a stack has more than the tensor it is of."""
    return part[(0,) * (part.dim() - num_dims)] if part.dim() > num_dims else part


def _offset(local: Region, inner: Region) -> Region:
    return tuple(
        (origin + start, origin + stop)
        for (origin, _), (start, stop) in zip(local, inner, strict=True)
    )
