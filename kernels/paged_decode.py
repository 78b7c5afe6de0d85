"""Attention of one query per sequence over the paged KV pool.

    out[n, h] = sum_j softmax_j(scale q[n, h] . k[n, j, h // G]) v[n, j, h // G],   length - window <= j < length

N sequences (rows of a step; a padded one has length 0), length = seq_lens[n], H query heads, K KV heads, G = H / K,
D head size, S block size.

    paged_decode(q (N, H, D), pool (blocks, S, 2, K, D), block_tables (N, max_blocks) int32, seq_lens (N) int32,
                 out (N, H, D), *, scale, window=None, workspace, deterministic=False, max_len, prefix=None,
                 order=None, few_kernels=False)
    workspace = DecodeWorkspace.allocate(max_batch=, num_heads=, num_kv_heads=, head_dim=, device=)

The query's own key and value are in the pool already: `seq_lens` counts them. Everything on the device, and nothing
waits for it: launches depend on shapes and on `max_len` alone, so a CUDA graph can hold them. A sequence of length 0
gets zeros. Table entries past a sequence's last block are not read.

A program takes the G queries of one KV head of one sequence, and one split of its keys. How many splits there are
follows from the batch; where there are several, the program that finishes last adds the parts up in their order.
`deterministic`: one split, so a sequence's result has the same bits in any batch, and those of `paged_prefill`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from .attention_configs import DecodeConfig, decode_config
from .attention_tiles import (
    attend_tile,
    divided,
    given_total,
    no_total,
    precision,
    row_total,
)
from .launching import (
    chaining,
    jit,
    launching_on,
    next_power_of_two,
    power_of_two_within,
    take_turn,
    tl,
)

MAX_SPLITS = 32
"""Most splits of a sequence's keys."""
MAX_PROGRAMS = 4096
"""Most programs that sequences are split into; larger batches are not split."""
ORDERED_PROGRAMS = 512
"""With fewer programs all run at once, and their order does not matter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeWorkspace:
    """Scratch memory of decode attention; one serves all layers, and all calls of one stream."""

    parts: torch.Tensor
    """(floats) float32: what each split found."""
    arrivals: torch.Tensor
    """(max_batch * K) int32: how many splits of a sequence's KV head are done; zero between launches."""

    @classmethod
    def allocate(
        cls,
        *,
        max_batch: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        device: torch.device | str,
    ) -> DecodeWorkspace:
        """Enough for any batch of up to `max_batch` sequences."""
        return cls(
            parts=torch.zeros(
                MAX_PROGRAMS * (num_heads // num_kv_heads) * (head_dim + 2), device=device
            ),
            arrivals=torch.zeros(max_batch * num_kv_heads, dtype=torch.int32, device=device),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixState:
    """Where the online softmax of each row stands after a prefix that is done; decode goes on from there."""

    lengths: torch.Tensor
    """(N) int32: keys that are done, a multiple of a tile's; 0: none."""
    parts: torch.Tensor
    """(N, K, splits * G * (D + 2)) float32: what `store_part` left."""
    splits: int
    """In how many parts the prefix was done."""


@jit
def store_part(  # type: ignore[no-untyped-def]
    found,
    split,
    acc,
    peak,
    total,
    G: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Leave what one split of a pair's keys gave where `add_up` finds it."""
    row = tl.arange(0, R)
    column = tl.arange(0, DP)
    real = row < G
    at = split * G + row
    cell = real[:, None] & (column < D)[None, :]
    tl.store(found + at[:, None] * D + column[None, :], acc, mask=cell)
    tl.store(found + SPLITS * G * D + at, peak, mask=real)
    tl.store(found + SPLITS * G * (D + 1) + at, total, mask=real)


@jit
def add_up(  # type: ignore[no-untyped-def]
    found,
    G: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """(acc, peak, total) of all splits of a pair's keys, in their order; of one split, its bits. R rows, at least G."""
    row = tl.arange(0, R)
    column = tl.arange(0, DP)
    real = row < G
    cell = real[:, None] & (column < D)[None, :]
    acc = tl.zeros((R, DP), tl.float32)
    peak = tl.full((R,), float("-inf"), tl.float32)
    total = tl.zeros((R,), tl.float32)
    for split in range(SPLITS):
        at = split * G + row
        # Other programs wrote these: read them from where all programs see them.
        part_peak = tl.load(
            found + SPLITS * G * D + at, mask=real, other=float("-inf"), cache_modifier=".cg"
        )
        part_total = tl.load(
            found + SPLITS * G * (D + 1) + at, mask=real, other=0.0, cache_modifier=".cg"
        )
        part = tl.load(
            found + at[:, None] * D + column[None, :], mask=cell, other=0.0, cache_modifier=".cg"
        )
        new_peak = tl.maximum(peak, part_peak)
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        old, new = tl.math.exp2(peak - base), tl.math.exp2(part_peak - base)
        acc = acc * old[:, None] + part * new[:, None]
        total = total * old + part_total * new
        peak = new_peak
    return acc, peak, total


@jit
def decode_kernel(  # type: ignore[no-untyped-def]
    q,
    pool,
    tables,
    seq_lens,
    out,
    parts,
    arrivals,
    prefix_lens,
    prefix_parts,
    order,
    scale,
    q_row,
    q_head,
    out_row,
    out_head,
    pool_block,
    pool_slot,
    pool_values,
    pool_head,
    table_row,
    G: tl.constexpr,
    GP: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    S: tl.constexpr,
    N: tl.constexpr,
    SPLITS: tl.constexpr,
    WINDOW: tl.constexpr,
    PREFIX: tl.constexpr,
    ORDERED: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """The formula above for one KV head (axis 0), one split (axis 1) of one sequence (axis 2)."""
    if CHAINED:
        take_turn()
    head = tl.program_id(0)
    split = tl.program_id(1)
    n = tl.program_id(2).to(tl.int64)
    if ORDERED:
        n = tl.load(order + n).to(tl.int64)
    num_heads = tl.num_programs(0)
    row = tl.arange(0, R)
    column = tl.arange(0, DP)
    real = row < G
    cell = real[:, None] & (column < D)[None, :]
    h = head * G + row

    queries = tl.load(q + n * q_row + h[:, None] * q_head + column[None, :], mask=cell, other=0.0)
    length = tl.load(seq_lens + n)
    low = 0
    if WINDOW > 0:
        low = tl.maximum(length - WINDOW, 0)
    begin = low // N
    if PREFIX:
        begin = tl.load(prefix_lens + n) // N
    num_tiles = tl.maximum(tl.cdiv(length, N) - begin, 0)
    per_split = tl.cdiv(num_tiles, SPLITS)
    first = (begin + split * per_split) * N
    last = tl.minimum((begin + (split + 1) * per_split) * N, length)

    # Parts of one (sequence, KV head) lie together: acc (splits, G, D), then peaks and totals (splits, G).
    pair = n * num_heads + head
    acc = tl.zeros((R, DP), tl.float32)
    peak = tl.full((R,), float("-inf"), tl.float32)
    total = no_total(R, EXACT)
    if PREFIX > 0:
        if (begin > 0) & (split == 0):
            found = prefix_parts + pair * (PREFIX * G * (D + 2))
            acc, peak, given = add_up(found, G, R, D, DP, PREFIX)
            total = given_total(given, EXACT)
    if first < last:
        position = tl.full((R,), 0, tl.int32) + (length - 1)
        heads = pool + head.to(tl.int64) * pool_head
        for key in tl.range(first, last, N, num_stages=STAGES):
            acc, peak, total = attend_tile(
                acc, peak, total, queries, position, heads, tables + n * table_row, key, low,
                length, scale, pool_block, pool_slot, pool_values,
                S=S, D=D, DP=DP, N=N, WINDOW=WINDOW, MASKED=True, EXACT=EXACT, PRECISION=PRECISION,
            )  # fmt: skip

    output = out + n * out_row
    if SPLITS == 1:
        tl.store(
            output + h[:, None] * out_head + column[None, :],
            divided(acc, total, EXACT).to(out.dtype.element_ty),
            mask=cell,
        )
    else:
        found = parts + pair * (SPLITS * G * (D + 2))
        store_part(found, split, acc, peak, row_total(total, EXACT), G, R, D, DP, SPLITS)
        tl.debug_barrier()  # all stores of this program come before its arrival
        arrived = tl.atomic_add(arrivals + pair, 1, sem="acq_rel", scope="gpu")
        if arrived == SPLITS - 1:
            tl.store(arrivals + pair, 0)
            tl.debug_barrier()
            whole, _peak, given = add_up(found, G, GP, D, DP, SPLITS)
            few = tl.arange(0, GP)
            tl.store(
                output + (head * G + few)[:, None] * out_head + column[None, :],
                divided(whole, given, False).to(out.dtype.element_ty),
                mask=(few < G)[:, None] & (column < D)[None, :],
            )


def num_splits(*, batch: int, num_kv_heads: int, max_len: int, config: DecodeConfig) -> int:
    """Splits of each sequence's keys: enough programs to fill the device, none of less than `config.split_keys`."""
    wanted = min(config.programs, MAX_PROGRAMS) // (batch * num_kv_heads)
    useful = -(-max_len // config.split_keys)
    return max(1, min(wanted, useful, MAX_SPLITS))


def config_for(
    q: torch.Tensor, num_kv_heads: int, *, deterministic: bool, after_prefix: bool = False
) -> DecodeConfig:
    """The stored shape of a launch over q (N, H, D)."""
    batch, num_heads, head_dim = q.shape
    return decode_config(
        q.device,
        head_dim=head_dim,
        group=num_heads // num_kv_heads,
        programs=batch * num_kv_heads,
        dtype=q.dtype,
        deterministic=deterministic,
        after_prefix=after_prefix,
    )


def paged_decode(
    q: torch.Tensor,
    pool: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    out: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    workspace: DecodeWorkspace,
    deterministic: bool = False,
    max_len: int,
    prefix: PrefixState | None = None,
    order: torch.Tensor | None = None,
    few_kernels: bool = False,
    config: DecodeConfig | None = None,
) -> torch.Tensor:
    """Attend into `out`, and return it.

    max_len: no sequence is longer; a matter of speed alone.
    few_kernels: splits are a power of two, so that batches of any size and length share a few compiled kernels.
    order: (N) int32, every sequence once: who starts first; a matter of speed alone. With the longest first none is
        left over at the end.

    The last dimension of every tensor is contiguous. `prefix` excludes `window`.
    """
    batch, num_heads, head_dim = q.shape
    block_size, num_kv_heads = pool.shape[1], pool.shape[3]
    group = num_heads // num_kv_heads
    if batch == 0:
        return out
    if config is None:
        config = config_for(q, num_kv_heads, deterministic=deterministic)
    most = max_len if window is None else min(max_len, window)
    splits = num_splits(batch=batch, num_kv_heads=num_kv_heads, max_len=most, config=config)
    splits = 1 if deterministic else power_of_two_within(splits) if few_kernels else splits
    if batch * num_kv_heads * splits < ORDERED_PROGRAMS:
        order = None
    kernel: Any = decode_kernel
    with launching_on(q):
        kernel[(num_kv_heads, splits, batch)](
            q,
            pool,
            block_tables,
            seq_lens,
            out,
            workspace.parts,
            workspace.arrivals,
            seq_lens if prefix is None else prefix.lengths,
            workspace.parts if prefix is None else prefix.parts,
            seq_lens if order is None else order,
            scale * math.log2(math.e),
            q.stride(0),
            q.stride(1),
            out.stride(0),
            out.stride(1),
            pool.stride(0),
            pool.stride(1),
            pool.stride(2),
            pool.stride(3),
            block_tables.stride(0),
            G=group,
            GP=next_power_of_two(group),
            R=max(16, next_power_of_two(group)),
            D=head_dim,
            DP=next_power_of_two(head_dim),
            S=block_size,
            N=config.keys,
            SPLITS=splits,
            WINDOW=window or 0,
            PREFIX=0 if prefix is None else prefix.splits,
            ORDERED=order is not None,
            EXACT=deterministic,
            PRECISION=precision(q.dtype, q.device),
            STAGES=config.stages,
            num_warps=config.warps,
            **chaining(q),
        )
    return out


def reference(
    q: torch.Tensor,
    pool: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """The formula in float64, (N, H, D); the tensors may be on any device."""
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    block_size, num_kv_heads, head_dim = pool.shape[1], pool.shape[3], pool.shape[4]
    for n, length in enumerate(seq_lens.tolist()):
        if length == 0:
            continue
        first = 0 if window is None else max(0, length - window)
        blocks = block_tables[n, : -(-length // block_size)].long()
        kv = pool[blocks].reshape(-1, 2, num_kv_heads, head_dim)[first:length].double()
        queries = q[n].double().view(num_kv_heads, -1, head_dim)
        weights = torch.softmax(torch.einsum("kgd,jkd->kgj", queries, kv[:, 0]) * scale, -1)
        out[n] = torch.einsum("kgj,jkd->kgd", weights, kv[:, 1]).reshape(-1, head_dim)
    return out
