"""What each rank of an engine holds of each tensor, and whether all ranks together hold the model."""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence

import msgspec
import numpy as np

from . import region as regions
from .manifest import TensorMeta, dtype_name
from .region import Region
from .weight_map import WeightMap


class Holdings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The regions that one rank holds, as it tells the other ranks."""

    manifest: str
    """SHA-256, in hex, of the names, shapes and dtypes of the model's tensors, in their order."""
    table: bytes
    """int64 rows: a tensor's position, then first and end in each dimension (of a scalar there are none), then -1s."""
    width: int
    """Numbers in a row."""

    @classmethod
    def of(cls, weight_map: WeightMap) -> Holdings:
        """Of this rank; what it holds nothing of is left out."""
        metas = weight_map.metas()
        text = repr([(meta.name, meta.shape, dtype_name(meta.dtype)) for meta in metas])
        index = {meta.name: i for i, meta in enumerate(metas)}
        rows = [
            (index[part.name], *(edge for bounds in part.region for edge in bounds))
            for part in weight_map.placements
            if part.destination.numel()
        ]
        width = max((len(row) for row in rows), default=1)
        padded = [(*row, *(-1,) * (width - len(row))) for row in rows]
        table = np.array(padded, dtype="<i8").reshape(-1, width)
        digest = hashlib.sha256(text.encode()).hexdigest()
        return cls(manifest=digest, table=table.tobytes(), width=width)

    def regions(self, metas: Sequence[TensorMeta]) -> Iterator[tuple[int, Region]]:
        """Positions among `metas`, and regions."""
        for row in np.frombuffer(self.table, dtype="<i8").reshape(-1, self.width).tolist():
            edges = row[1 : 1 + 2 * len(metas[row[0]].shape)]
            yield row[0], tuple(zip(edges[::2], edges[1::2], strict=True))


def joint_problems(metas: Sequence[TensorMeta], ranks: Sequence[Holdings]) -> list[str]:
    """Why the ranks do not hold the model together: one line for each tensor that they do not tile.

    Several ranks may hold the same region. Parts that overlap and are not the same are refused: their fingerprints
    would not add up to the whole's.
    """
    other = [rank for rank, held in enumerate(ranks) if held.manifest != ranks[0].manifest]
    if other:
        return [f"ranks {other}: got another list of tensors than rank 0"]
    held: defaultdict[int, set[Region]] = defaultdict(set)
    for rank in ranks:
        for i, region in rank.regions(metas):
            held[i].add(region)
    problems = []
    for i, meta in enumerate(metas):
        parts = sorted(held[i])
        total = sum(math.prod(regions.sizes(part)) for part in parts)
        twice = next(regions.overlapping(parts), None)
        if twice is not None:
            problems.append(f"{meta.name}: got the parts {twice[0]} and {twice[1]} on two ranks")
        elif total != meta.num_elements:
            missing = meta.num_elements - total
            problems.append(
                f"{meta.name}: got no rank for {missing} of its {meta.num_elements} elements"
            )
    return problems
