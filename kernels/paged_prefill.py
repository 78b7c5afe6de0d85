"""Attention of several queries per sequence over the paged KV pool: prefill, chunked prefill, mixed batches.

    out[t, h] = sum_j softmax_j(scale q[t, h] . k[n, j, h // G]) v[n, j, h // G],   p[t] - window < j <= p[t]

Token t of sequence n, with query_starts[n] <= t < query_starts[n + 1], has position
p[t] = seq_lens[n] - query_starts[n + 1] + t: a sequence's queries are its last tokens, and whatever is before them is
in the pool already, as are their own keys and values. A decode is a sequence with one query.

N sequences, T query tokens, H query heads, K KV heads, G = H / K, D head size, S block size.

    paged_prefill(q (T, H, D), pool (blocks, S, 2, K, D), block_tables (N, max_blocks) int32,
                  query_starts (N + 1) int32, seq_lens (N) int32, out (T, H, D), *, scale, window=None,
                  max_query_len, deterministic=False)

Everything on the device, and nothing waits for it. Rows of `out` from query_starts[N] on are not written. Sequences may
have no queries. Table entries past a sequence's last block are not read.

A program takes R rows, the G heads of R / G tokens, and walks over all keys they see: nothing is split, so with one
configuration (`deterministic`) a token's result has the same bits in any batch and under any chunking.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from .attention_configs import PrefillConfig, prefill_config
from .attention_tiles import attend_page, attend_tile, described, divided, no_total, precision
from .launching import jit, launching_on, next_power_of_two, tl

SEARCHED = 256
"""Sequences that a program looks through at once for its own."""


@jit
def sequence_of(  # type: ignore[no-untyped-def]
    tile, query_starts, num_seqs, TOKENS: tl.constexpr, SEARCHED: tl.constexpr
):
    """The last sequence whose first tile is not after `tile`."""
    n = tl.full((), -1, tl.int32)
    for at in range(0, num_seqs, SEARCHED):
        some = at + tl.arange(0, SEARCHED)
        start = tl.load(query_starts + some, mask=some < num_seqs, other=0)
        n += tl.sum(((some < num_seqs) & (start // TOKENS + some <= tile)).to(tl.int32))
    return n


@jit(
    do_not_specialize=["num_seqs"],
    # Where decodes come before, these begin anywhere.
    do_not_specialize_on_alignment=["query_starts", "seq_lens"],
)
def prefill_kernel(  # type: ignore[no-untyped-def]
    q,
    pool,
    pages,
    tables,
    query_starts,
    seq_lens,
    out,
    num_seqs,
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
    K: tl.constexpr,
    G: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    S: tl.constexpr,
    N: tl.constexpr,
    SEARCHED: tl.constexpr,
    PAGES: tl.constexpr,
    WINDOW: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The formula above for one of K KV heads and R // G tokens of one sequence: program head + K tile, on the one axis
    of a grid that has room for any number of tiles.

    Sequence n has the tiles from query_starts[n] // TOKENS + n on, at least as many as it needs; those of no tokens
    return. The last tiles of a sequence see most keys and come first.
    """
    TOKENS: tl.constexpr = R // G
    head = tl.program_id(0) % K
    tile = (tl.num_programs(0) - 1 - tl.program_id(0)) // K
    n = sequence_of(tile, query_starts, num_seqs, TOKENS, SEARCHED)
    q_first = tl.load(query_starts + n)
    q_end = tl.load(query_starts + n + 1)
    token = q_first + (tile - q_first // TOKENS - n) * TOKENS
    if token < q_end:
        length = tl.load(seq_lens + n)
        num_tokens = tl.minimum(q_end - token, TOKENS)
        first_position = length - q_end + token
        last_position = first_position + num_tokens - 1

        row = tl.arange(0, R)
        column = tl.arange(0, DP)
        within = row // G
        real = (row < TOKENS * G) & (within < num_tokens)
        cell = real[:, None] & (column < D)[None, :]
        t = (token + within).to(tl.int64)
        h = head * G + row % G
        queries = tl.load(
            q + t[:, None] * q_row + h[:, None] * q_head + column[None, :], mask=cell, other=0.0
        )
        # Rows past the last token see what the last one sees, and are not stored.
        position = first_position + tl.minimum(within, num_tokens - 1)
        heads = pool + head.to(tl.int64) * pool_head
        table = tables + n.to(tl.int64) * table_row

        low = 0
        if WINDOW > 0:
            low = tl.maximum(first_position - WINDOW + 1, 0)
        acc = tl.zeros((R, DP), tl.float32)
        peak = tl.full((R,), float("-inf"), tl.float32)
        total = no_total(R, EXACT)
        # Tiles that all rows see whole need no mask: [clear, until). Before them the window cuts, after them causality.
        end = last_position + 1
        begin = low // N * N
        clear = begin
        until = (first_position + 1) // N * N
        if WINDOW > 0:
            clear = tl.minimum(tl.cdiv(tl.maximum(end - WINDOW, 0), N) * N, tl.cdiv(end, N) * N)
            until = tl.maximum(until, clear)
            for key in tl.range(begin, clear, N, num_stages=STAGES):
                acc, peak, total = attend_tile(
                    acc, peak, total, queries, position, heads, table, key, low, end, scale,
                    pool_block, pool_slot, pool_values,
                    S=S, D=D, DP=DP, N=N, WINDOW=WINDOW, MASKED=True, EXACT=EXACT, PRECISION=PRECISION,
                )  # fmt: skip
        for key in tl.range(clear, until, N, num_stages=STAGES):
            if PAGES:
                acc, peak, total = attend_page(
                    acc, peak, total, queries, pages, head * D, (K + head) * D,
                    table, key, scale, S=S, N=N, EXACT=EXACT, PRECISION=PRECISION,
                )  # fmt: skip
            else:
                acc, peak, total = attend_tile(
                    acc, peak, total, queries, position, heads, table, key, low, end, scale,
                    pool_block, pool_slot, pool_values,
                    S=S, D=D, DP=DP, N=N, WINDOW=WINDOW, MASKED=False, EXACT=EXACT,
                    PRECISION=PRECISION,
                )  # fmt: skip
        for key in tl.range(until, end, N, num_stages=STAGES):
            acc, peak, total = attend_tile(
                acc, peak, total, queries, position, heads, table, key, low, end, scale,
                pool_block, pool_slot, pool_values,
                S=S, D=D, DP=DP, N=N, WINDOW=WINDOW, MASKED=True, EXACT=EXACT, PRECISION=PRECISION,
            )  # fmt: skip
        acc = divided(acc, total, EXACT)
        tl.store(
            out + t[:, None] * out_row + h[:, None] * out_head + column[None, :],
            acc.to(out.dtype.element_ty),
            mask=cell,
        )


def paged_prefill(
    q: torch.Tensor,
    pool: torch.Tensor,
    block_tables: torch.Tensor,
    query_starts: torch.Tensor,
    seq_lens: torch.Tensor,
    out: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    max_query_len: int,
    deterministic: bool = False,
    config: PrefillConfig | None = None,
) -> torch.Tensor:
    """Attend into `out`, and return it. `max_query_len`: no sequence has more queries; a matter of speed alone.

    The last dimension of every tensor is contiguous.
    """
    num_tokens, num_heads, head_dim = q.shape
    num_seqs = seq_lens.shape[0]
    block_size, num_kv_heads = pool.shape[1], pool.shape[3]
    group = num_heads // num_kv_heads
    if num_seqs == 0 or num_tokens == 0:
        return out
    if config is None:
        config = prefill_config(
            q.device,
            head_dim=head_dim,
            group=group,
            rows=max_query_len * group,
            block_size=block_size,
            dtype=q.dtype,
            deterministic=deterministic,
        )
    rows = max(config.rows, next_power_of_two(group))
    tiles = num_tokens // (rows // group) + num_seqs
    pages = described(pool, config.keys)
    kernel: Any = prefill_kernel
    with launching_on(q):
        kernel[(num_kv_heads * tiles,)](
            q,
            pool,
            pool if pages is None else pages,
            block_tables,
            query_starts,
            seq_lens,
            out,
            num_seqs,
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
            K=num_kv_heads,
            G=group,
            R=rows,
            D=head_dim,
            DP=next_power_of_two(head_dim),
            S=block_size,
            N=config.keys,
            SEARCHED=SEARCHED,
            PAGES=pages is not None,
            WINDOW=window or 0,
            EXACT=deterministic,
            PRECISION=precision(q.dtype, q.device),
            STAGES=config.stages,
            num_warps=config.warps,
            **({"maxnreg": config.registers} if config.registers and q.is_cuda else {}),
        )
    return out


def reference(
    q: torch.Tensor,
    pool: torch.Tensor,
    block_tables: torch.Tensor,
    query_starts: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """The formula in float64, (T, H, D), zeros from query_starts[N] on; the tensors may be on any device."""
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    block_size, num_kv_heads, head_dim = pool.shape[1], pool.shape[3], pool.shape[4]
    starts = query_starts.tolist()
    for n, length in enumerate(seq_lens.tolist()):
        first, last = starts[n], starts[n + 1]
        if first == last:
            continue
        blocks = block_tables[n, : -(-length // block_size)].long()
        num_queries = last - first
        low = 0 if window is None else max(0, length - num_queries - window + 1)
        kv = pool[blocks].reshape(-1, 2, num_kv_heads, head_dim)[low:length].double()
        queries = q[first:last].double().view(num_queries, num_kv_heads, -1, head_dim)
        position = torch.arange(length - num_queries, length, device=q.device)[:, None]
        key = torch.arange(low, length, device=q.device)[None]
        seen = key <= position
        if window is not None:
            seen &= key > position - window
        scores = torch.einsum("tkgd,jkd->kgtj", queries, kv[:, 0]) * scale
        weights = torch.softmax(scores.masked_fill(~seen, float("-inf")), -1)
        attended = torch.einsum("kgtj,jkd->tkgd", weights, kv[:, 1])
        out[first:last] = attended.reshape(num_queries, -1, head_dim)
    return out
