"""Which sequences of a batch share a prefix of their block tables, and how a kernel is told.

The host finds the groups and packs them into one flat list of int32; the device reads them from a buffer of fixed
size, so that a CUDA graph can hold the launches whatever the groups.

N sequences, T tiles: runs of members of one group that one program takes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

PREFIX_UNIT = 64
"""Shared keys are a multiple of this, and of the block size: tiles of all configurations divide it."""
_TILE_NUMBERS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedPrefix:
    """Sequences whose block tables begin with the same blocks."""

    rows: tuple[int, ...]
    """Of the batch; at least two."""
    num_blocks: int
    """Blocks that they share."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedPrefixes:
    """The groups of a batch on the device."""

    members: torch.Tensor
    """(N) int32: rows of the batch, those of one tile side by side."""
    lengths: torch.Tensor
    """(N) int32: keys of each row of the batch that its tile does; 0: it is in none."""
    tiles: torch.Tensor
    """(T, 3) int32: where in `members` a tile begins, its number of members (0: unused), its number of keys."""

    @classmethod
    def views(cls, buffer: torch.Tensor, max_batch: int) -> SharedPrefixes:
        """Of `buffer`, `num_numbers(max_batch)` int32 in the order of `packed`; zeros mean no groups."""
        members, lengths, tiles = buffer.split(
            [max_batch, max_batch, _TILE_NUMBERS * max_tiles(max_batch)]
        )
        return cls(members=members, lengths=lengths, tiles=tiles.view(-1, _TILE_NUMBERS))


def max_tiles(max_batch: int) -> int:
    """T: each has two members at least."""
    return max(1, max_batch // 2)


def num_numbers(max_batch: int) -> int:
    """Of the buffer behind `SharedPrefixes`."""
    return 2 * max_batch + _TILE_NUMBERS * max_tiles(max_batch)


def find_shared_prefixes(
    tables: Sequence[Sequence[int]], *, block_size: int, min_keys: int = PREFIX_UNIT
) -> list[SharedPrefix]:
    """The groups that save the most reading, where one sequence is in one group at most.

    `tables[n]` are the blocks of row n that other rows may share: without the one that its next key goes to. A group
    shares at least `min_keys` keys. Where a prefix of many is the start of longer ones of few, the better is taken.
    """
    unit = math.lcm(PREFIX_UNIT, block_size) // block_size
    least = max(unit, -(-min_keys // block_size))
    rows = [row for row, table in enumerate(tables) if len(table) >= least]
    return _best(tables, rows, 0, unit, least)[1]


def _best(
    tables: Sequence[Sequence[int]], rows: list[int], depth: int, unit: int, least: int
) -> tuple[int, list[SharedPrefix]]:
    """(blocks saved, groups) among rows whose first `depth` blocks are the same; `depth` is a multiple of `unit`."""
    branches: dict[tuple[int, ...], list[int]] = {}
    for row in rows:
        step = tuple(tables[row][depth : depth + unit])
        if len(step) == unit:
            branches.setdefault(step, []).append(row)
    saved, groups = 0, []
    for members in branches.values():
        if len(members) < 2:
            continue
        common = depth + unit + _common(tables, members, depth + unit, unit)
        inner_saved, inner = _best(tables, members, common, unit, least)
        own_saved = (len(members) - 1) * common
        if common >= least and own_saved >= inner_saved:
            saved += own_saved
            groups.append(SharedPrefix(rows=tuple(members), num_blocks=common))
        else:
            saved += inner_saved
            groups += inner
    return saved, groups


def _common(tables: Sequence[Sequence[int]], members: Sequence[int], depth: int, unit: int) -> int:
    """How many more blocks from `depth` on all members share, in whole units."""
    first = tables[members[0]]
    common = len(first) - depth
    for row in members:
        table = tables[row]
        common = min(common, len(table) - depth) // unit * unit
        if table[depth : depth + common] == first[depth : depth + common]:
            continue
        pairs = zip(first[depth : depth + common], table[depth : depth + common], strict=True)
        common = next(i for i, (a, b) in enumerate(pairs) if a != b) // unit * unit
    return common


def packed(
    groups: Sequence[SharedPrefix], *, max_batch: int, block_size: int, members_per_tile: int
) -> list[int]:
    """The numbers of `SharedPrefixes` for these groups; large groups take several tiles of about the same size."""
    members: list[int] = []
    lengths = [0] * max_batch
    tiles: list[int] = []
    for group in groups:
        keys = group.num_blocks * block_size
        for row in group.rows:
            lengths[row] = keys
        count = -(-len(group.rows) // members_per_tile)
        begin = len(members)
        ends = [begin + len(group.rows) * (i + 1) // count for i in range(count)]
        for first, end in zip([begin, *ends], ends, strict=False):
            tiles += (first, end - first, keys)
        members += group.rows
    members += [0] * (max_batch - len(members))
    tiles += [0] * (_TILE_NUMBERS * max_tiles(max_batch) - len(tiles))
    return members + lengths + tiles
