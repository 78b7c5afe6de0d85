"""Who writes which part of the arena when all ranks of a trainer publish together.

Pure functions of what the ranks hold and of the engine's layout: rank 0 decides once for a set of tensors, and every
rank compiles its own share of that decision.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np
import torch
from msgspec.structs import replace

from ..errors import ManifestMismatch
from ..layout import region as regions
from ..layout.manifest import Manifest, parse_dtype
from ..layout.region import Region
from ..publisher.selection import Layout, Selection, Selector
from .messages import Tensor

SKIP, WRITE, COMPARE = 0, 1, 2
"""What a rank does with one of its parts: another rank writes it; write it; count it, its row comes by another name."""


@dataclass(frozen=True, slots=True)
class Part:
    """What one piece of a rank's tensor is to one row of the manifest."""

    item: int
    """Which of the rank's tensors."""
    piece: int
    """Which of that tensor's pieces."""
    row: int
    """Position in the manifest."""
    region: Region
    """Part of the row."""
    inner: Region
    """Part of the piece, counted from its first element."""


def parts_of(
    layout: Layout, tensors: Sequence[tuple[str, Sequence[Region]]], skip: frozenset[str]
) -> list[Part]:
    """All parts that a rank holds, in the order in which both sides count them; fused tensors cut into theirs."""
    parts = []
    for item, (given, held) in enumerate(tensors):
        name = layout.known(given)
        if name in skip:
            continue
        fused = layout.fused.get(name)
        if fused is None:
            row = layout.index.get(name, layout.aliases.get(name, -1))
            places = [(row, regions.whole(layout.shapes[row]))]
        else:
            rows = [layout.index[part] for part in fused.parts]
            places = [
                (row, fused.region(i, regions.whole(layout.shapes[row])))
                for i, row in enumerate(rows)
            ]
        for number, region in enumerate(held):
            for row, place in places:
                both = regions.common(region, place)
                if both is not None:
                    new = len(place) - len(layout.shapes[row])
                    own = regions.counted_from(both, place)[new:]
                    parts.append(Part(item, number, row, own, regions.counted_from(both, region)))
    return parts


def buckets_of(manifest: Manifest, rows: np.ndarray) -> list[np.ndarray]:
    """The rows of an update, bucket by bucket."""
    cuts = np.searchsorted(rows, [bucket.start for bucket in manifest.buckets[1:]])
    return [bucket for bucket in np.split(rows, cuts) if len(bucket)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What rank 0 has decided for one set of tensors."""

    rows: np.ndarray
    """Rows of the manifest that come, ascending, int64."""
    actions: list[bytes]
    """Of every rank: SKIP, WRITE or COMPARE for each of its parts."""
    compared: list[list[tuple[str, int]]]
    """Of every rank: name and row of its parts to COMPARE, in order."""
    origins: dict[int, str]
    """The name by which a row comes, where another name is compared with it."""
    casts: list[tuple[str, str, str]]
    """Name, dtype got, dtype of the engine."""
    num_tensors: int
    """Names given, each counted once."""
    ignored: frozenset[str]
    """Names that the engine has no use for."""


class _ShapeSelector(Selector):
    """Sorts names by shape and dtype alone; other names of a row are kept, for their values to be compared later."""

    twins: set[str]
    unused: frozenset[str] = frozenset()

    def _place(self, i: int, name: str, tensor: torch.Tensor, selection: Selection) -> None:
        origin = self._origin[i]
        if origin is not None and origin != name:
            self.twins.add(name)
        else:
            super()._place(i, name, tensor, selection)

    def add_problems(self, problems: list[str]) -> None:
        self._problems += problems

    def origin(self, row: int) -> str | None:
        return self._origin[row]


def decide(
    layout: Layout,
    described: Sequence[Sequence[Tensor]],
    *,
    strict: bool,
    cast: bool,
    ignored: Callable[[list[str]], frozenset[str]],
) -> Decision:
    """Check what all ranks hold and share the writing out; one `ManifestMismatch` with every problem of any rank.

    A part that several ranks hold is written by the one that has least to write so far.
    """
    selector = _ShapeSelector(
        layout,
        cast=cast,
        packed=lambda i: torch.empty(0),
        ignored=lambda names: _remember(selector, ignored(names)),
    )
    selector.twins = set()
    described = [
        [replace(tensor, name=layout.known(tensor.name)) for tensor in tensors]
        for tensors in described
    ]
    merged, problems = _merge(described)
    # One element stands for all: shapes and dtypes are looked at here, never values.
    selection = selector.take(
        (name, torch.empty((), dtype=parse_dtype(tensor.dtype)).expand(tensor.shape))
        for name, tensor in merged.items()
    )
    selector.add_problems(problems)
    selector.finish(strict=strict)
    shares = _Shares(layout, selector, len(described))
    for rank, tensors in enumerate(described):
        held = [(tensor.name, tensor.regions) for tensor in tensors]
        shares.add(rank, held, parts_of(layout, held, selector.unused))
    rows = sorted(selection.sources)
    shares.check_coverage(rows)
    compared = shares.compared
    return Decision(
        rows=np.array(rows, dtype=np.int64),
        actions=[bytes(actions) for actions in shares.actions],
        compared=compared,
        origins={row: selector.origin(row) or "" for ranks in compared for _, row in ranks},
        casts=selection.casts,
        num_tensors=selection.num_tensors,
        ignored=selector.unused,
    )


def _remember(selector: _ShapeSelector, names: frozenset[str]) -> frozenset[str]:
    selector.unused = names
    return names


def _merge(described: Sequence[Sequence[Tensor]]) -> tuple[dict[str, Tensor], list[str]]:
    """Every name once, and what ranks say differently."""
    merged: dict[str, tuple[int, Tensor]] = {}
    problems = []
    for rank, tensors in enumerate(described):
        seen: set[str] = set()
        for tensor in tensors:
            if tensor.name in seen:
                problems.append(f"{tensor.name}: sent more than once by rank {rank}")
            seen.add(tensor.name)
            first, other = merged.setdefault(tensor.name, (rank, tensor))
            if (other.shape, other.dtype) != (tensor.shape, tensor.dtype):
                problems.append(
                    f"{tensor.name}: got {tensor.dtype} {list(tensor.shape)} on rank {rank}, "
                    f"expected {other.dtype} {list(other.shape)} as on rank {first}"
                )
    return {name: tensor for name, (_, tensor) in merged.items()}, problems


class _Shares:
    """Gives every distinct part of every name to one of the ranks that hold it."""

    def __init__(self, layout: Layout, selector: _ShapeSelector, num_ranks: int) -> None:
        self._layout = layout
        self._selector = selector
        self._taken: dict[tuple[str, int], dict[Region, list[tuple[int, int]]]] = defaultdict(dict)
        self.actions = [bytearray() for _ in range(num_ranks)]
        self._keys: list[list[tuple[str, int]]] = [[] for _ in range(num_ranks)]

    @property
    def compared(self) -> list[list[tuple[str, int]]]:
        """Of every rank: what it compares, in the order of its parts."""
        return [
            [key for key, action in zip(keys, actions, strict=True) if action == COMPARE]
            for keys, actions in zip(self._keys, self.actions, strict=True)
        ]

    def add(
        self, rank: int, held: Sequence[tuple[str, Sequence[Region]]], parts: list[Part]
    ) -> None:
        self.actions[rank] = bytearray(len(parts))
        for number, part in enumerate(parts):
            key = held[part.item][0], part.row
            self._keys[rank].append(key)
            self._taken[key].setdefault(part.region, []).append((rank, number))

    def check_coverage(self, rows: list[int]) -> None:
        """Every element of every row, and of every other name of it, must be somewhere; then deal the parts out."""
        problems = []
        loads = [0] * len(self.actions)
        expected = {(self._selector.origin(row) or "", row) for row in rows}
        for name, row in sorted(expected | set(self._taken), key=lambda key: (key[1], key[0])):
            shape = self._layout.shapes[row]
            held = self._taken.get((name, row), {})
            found = sum(math.prod(regions.sizes(region)) for region in held)
            total = math.prod(shape)
            if found < total:
                problems.append(
                    f"{name}: got {found} of {total} elements on the ranks of the mesh, expected all; pass a mesh "
                    "with every rank that holds a shard"
                )
            elif found > total or not _disjoint(list(held)):
                problems.append(
                    f"{name}: got parts on different ranks that overlap, expected equal or separate ones; use the "
                    "same placements on every rank"
                )
            action = WRITE if name == self._selector.origin(row) else COMPARE
            itemsize = self._layout.dtypes[row].itemsize
            for region, holders in held.items():
                rank, number = min(holders, key=lambda holder: (loads[holder[0]], holder))
                loads[rank] += math.prod(regions.sizes(region)) * itemsize
                self.actions[rank][number] = action
        if problems:
            raise ManifestMismatch(
                f"the shards of {len(problems)} tensors do not make up whole ones; nothing was written:\n  "
                + "\n  ".join(problems[:100])
            )


def _disjoint(parts: list[Region]) -> bool:
    """Whether no two of them share an element. Parts that differ along one dimension are the rule, and quick."""
    if len(parts) < 2:
        return True
    varying = [dim for dim in range(len(parts[0])) if len({part[dim] for part in parts}) > 1]
    if len(varying) == 1:
        ranges = sorted(part[varying[0]] for part in parts)
        return all(a[1] <= b[0] for a, b in pairwise(ranges))
    return not any(regions.overlap(a, b) for a, b in combinations(parts, 2))
