"""Decode attention that reads a prefix once for all sequences that share it.

The result is `paged_decode`'s. A first launch takes the tiles of `SharedPrefixes`: M sequences whose block tables begin
alike; the queries of one KV head of all of them, M x G rows, walk over the prefix once, and leave where their online
softmax stands. `paged_decode` then goes on from there with each sequence's own keys. So keys of a prefix are read once
per tile instead of once per sequence; `deterministic`, the bits are those of `paged_decode` alone.

N sequences, H query heads, K KV heads, G = H / K, D head size, S block size, T tiles.

    shared_prefix_decode(q (N, H, D), pool, block_tables, seq_lens, out, *, scale, shared, workspace, state,
                         deterministic=False, max_len)       # as paged_decode; without windows
    shared = SharedPrefixes.views(buffer, max_batch)         # once: names for parts of one int32 buffer on the device
    state = SharedState.allocate(max_batch=, num_heads=, num_kv_heads=, head_dim=, device=)                     # once
    groups = find_shared_prefixes(tables, block_size=)       # on the host, when the batch or its tables changed
    numbers = packed(groups, max_batch=, block_size=, members_per_tile=members_per_tile(...))   # goes into `buffer`

`SharedPrefixes` and what is on the host are in `shared_prefixes`.

Shapes depend on `max_batch` alone, and unused tiles return at once, so a CUDA graph can hold the launches. With no
groups at all, the result is still right, and costs a launch more than `paged_decode`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from .attention_configs import DecodeConfig, SharedConfig, shared_config
from .attention_tiles import attend_tile, no_total, precision, row_total
from .launching import (
    chaining,
    jit,
    launching_on,
    next_power_of_two,
    power_of_two_within,
    take_turn,
    tl,
)
from .paged_decode import MAX_PROGRAMS, DecodeWorkspace, PrefixState, config_for, paged_decode
from .shared_prefixes import PREFIX_UNIT, SharedPrefixes, max_tiles


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedState:
    """Scratch memory between the two launches; one serves all layers, and all calls of one stream."""

    parts: torch.Tensor
    """(floats) float32."""

    @classmethod
    def allocate(
        cls,
        *,
        max_batch: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        device: torch.device | str,
    ) -> SharedState:
        """Enough for any batch of up to `max_batch` sequences."""
        pairs = max(max_batch * num_kv_heads, MAX_PROGRAMS)
        group = num_heads // num_kv_heads
        return cls(parts=torch.zeros(pairs * group * (head_dim + 2), device=device))


def members_per_tile(
    device: torch.device,
    *,
    head_dim: int,
    group: int,
    dtype: torch.dtype,
    deterministic: bool = False,
) -> int:
    """How many sequences one tile takes, for `packed`."""
    config = shared_config(
        device, head_dim=head_dim, group=group, dtype=dtype, deterministic=deterministic
    )
    return tile_rows_of(config, group) // group


def tile_rows_of(config: SharedConfig, group: int) -> int:
    """At least four sequences to a tile: then there are no more tiles than `max_tiles`, whatever the groups."""
    return max(config.rows, 4 * next_power_of_two(group))


@jit
def prefix_kernel(  # type: ignore[no-untyped-def]
    q,
    pool,
    tables,
    members,
    tiles,
    parts,
    scale,
    q_row,
    q_head,
    pool_block,
    pool_slot,
    pool_values,
    pool_head,
    table_row,
    G: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    S: tl.constexpr,
    N: tl.constexpr,
    SPLITS: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """(acc, peak, total) of one KV head (axis 0) over one split (axis 1) of the keys of one tile (axis 2)."""
    if CHAINED:
        take_turn()
    head = tl.program_id(0)
    split = tl.program_id(1)
    tile = tiles + tl.program_id(2) * 3
    num_members = tl.load(tile + 1)
    if num_members > 0:
        first_member = tl.load(tile)
        num_keys = tl.load(tile + 2)
        row = tl.arange(0, R)
        column = tl.arange(0, DP)
        member = row // G
        real = member < num_members
        n = tl.load(members + first_member + member, mask=real, other=0).to(tl.int64)
        h = head * G + row % G
        cell = real[:, None] & (column < D)[None, :]
        queries = tl.load(
            q + n[:, None] * q_row + h[:, None] * q_head + column[None, :], mask=cell, other=0.0
        )
        table = tables + tl.load(members + first_member).to(tl.int64) * table_row
        heads = pool + head.to(tl.int64) * pool_head
        per_split = tl.cdiv(tl.cdiv(num_keys, N), SPLITS) * N
        acc = tl.zeros((R, DP), tl.float32)
        peak = tl.full((R,), float("-inf"), tl.float32)
        total = no_total(R, EXACT)
        end = tl.minimum((split + 1) * per_split, num_keys)
        for key in tl.range(split * per_split, end, N, num_stages=STAGES):
            acc, peak, total = attend_tile(
                acc, peak, total, queries, row, heads, table, key, 0, num_keys, scale,
                pool_block, pool_slot, pool_values,
                S=S, D=D, DP=DP, N=N, WINDOW=0, MASKED=False, EXACT=EXACT, PRECISION=PRECISION,
            )  # fmt: skip
        # Where `add_up` looks for the parts of a pair of a sequence and a KV head.
        pair = parts + (n * tl.num_programs(0) + head) * (SPLITS * G * (D + 2))
        at = split * G + row % G
        tl.store(pair[:, None] + at[:, None] * D + column[None, :], acc, mask=cell)
        tl.store(pair + SPLITS * G * D + at, peak, mask=real)
        tl.store(pair + SPLITS * G * (D + 1) + at, row_total(total, EXACT), mask=real)


def _num_splits(batch: int, num_kv_heads: int, max_len: int, config: SharedConfig) -> int:
    """Splits of each prefix; tiles are fewer than there could be, so they are taken to have eight members each.

    A power of two, so that few kernels are compiled.
    """
    expected = -(-batch // 8) * num_kv_heads
    most = MAX_PROGRAMS // (batch * num_kv_heads)
    splits = min(config.programs // expected, max_len // (2 * PREFIX_UNIT), most)
    return power_of_two_within(max(1, splits))


def shared_prefix_decode(
    q: torch.Tensor,
    pool: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    out: torch.Tensor,
    *,
    scale: float,
    shared: SharedPrefixes,
    workspace: DecodeWorkspace,
    state: SharedState,
    deterministic: bool = False,
    max_len: int,
    order: torch.Tensor | None = None,
    config: DecodeConfig | None = None,
    prefix_config: SharedConfig | None = None,
) -> torch.Tensor:
    """Attend into `out`, and return it; as `paged_decode`, without windows. `shared` may be of a larger batch."""
    batch, num_heads, head_dim = q.shape
    block_size, num_kv_heads = pool.shape[1], pool.shape[3]
    group = num_heads // num_kv_heads
    if batch == 0:
        return out
    chosen = prefix_config or shared_config(
        q.device, head_dim=head_dim, group=group, dtype=q.dtype, deterministic=deterministic
    )
    splits = 1 if deterministic else _num_splits(batch, num_kv_heads, max_len, chosen)
    kernel: Any = prefix_kernel
    with launching_on(q):
        kernel[(num_kv_heads, splits, max_tiles(batch))](
            q,
            pool,
            block_tables,
            shared.members,
            shared.tiles,
            state.parts,
            scale * math.log2(math.e),
            q.stride(0),
            q.stride(1),
            pool.stride(0),
            pool.stride(1),
            pool.stride(2),
            pool.stride(3),
            block_tables.stride(0),
            G=group,
            R=tile_rows_of(chosen, group),
            D=head_dim,
            DP=next_power_of_two(head_dim),
            S=block_size,
            N=chosen.keys,
            SPLITS=splits,
            EXACT=deterministic,
            PRECISION=precision(q.dtype, q.device),
            STAGES=chosen.stages,
            num_warps=chosen.warps,
            **chaining(q),
        )
    if config is None:
        config = config_for(q, num_kv_heads, deterministic=deterministic, after_prefix=True)
    if config.keys > PREFIX_UNIT:
        config = replace(config, keys=PREFIX_UNIT)
    return paged_decode(
        q,
        pool,
        block_tables,
        seq_lens,
        out,
        scale=scale,
        workspace=workspace,
        deterministic=deterministic,
        max_len=max_len,
        prefix=PrefixState(lengths=shared.lengths, parts=state.parts, splits=splits),
        order=order,
        config=config,
    )
