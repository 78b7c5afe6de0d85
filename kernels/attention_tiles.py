"""One tile of keys and values: the step that all paged attention kernels share.

A program holds R rows (queries of one KV head: tokens x the G heads that share it) and walks over tiles of N
keys with the online softmax, in base 2:

    peak' = max(peak, max_n s[r, n]);   w[r, n] = 2^(s[r, n] - peak');   f = 2^(peak - peak')
    total' = f total + sum_n w[r, n];   acc' = f acc + sum_n w[r, n] v[n]          with s = scale log2(e) q k^T

A row's result depends on the row and on the tiles that hold keys it sees, in order; not on the other rows, nor on
tiles of which it sees nothing: there w is 0 and f is 1. Tiles start at multiples of N from the sequence's first key.
Only the sum over n has an order that the compiler chooses by R and the number of warps. EXACT: it is a product with
ones, whose order is the tensor cores' own, and kernels of different R agree bit for bit.

The pool of a layer is (blocks, S, 2, K, D), keys and values interleaved. D is padded to a power of two, DP.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from .launching import jit, next_power_of_two, tl


def precision(dtype: torch.dtype, device: torch.device) -> str:
    """How the kernels' products are computed, for their PRECISION."""
    if dtype == torch.float32:
        return "ieee"
    return (
        "tf32" if device.type == "cuda" else "widened"
    )  # the interpreter has no bfloat16 products


def described(pool: torch.Tensor, keys: int) -> Any:
    """What `attend_page` reads tiles of `keys` keys of the pool through; None where it cannot."""
    block_size, head_dim = pool.shape[1], pool.shape[4]
    fits = block_size % keys == 0 and head_dim == next_power_of_two(head_dim)
    if (
        not fits
        or pool.dtype == torch.float32
        or not pool.is_contiguous()
        or not _copies(pool.device)
    ):
        return None
    from triton.tools.tensor_descriptor import TensorDescriptor

    matrix = pool.view(pool.shape[0] * block_size, -1)
    return TensorDescriptor.from_tensor(matrix, [keys, head_dim])


@lru_cache(maxsize=16)
def _copies(device: torch.device) -> bool:
    """Whether the device has a copy engine for tiles; the interpreter can do what it does."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)


@jit
def product(a, b, acc, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """acc + a b in float32, (R, N) from (R, D) and (D, N)."""
    if PRECISION == "widened":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision=PRECISION)


@jit
def tile_rows(  # type: ignore[no-untyped-def]
    table, first, end, pool_block, pool_slot, S: tl.constexpr, N: tl.constexpr
):
    """Where the keys [first, first + N) of a sequence lie in the pool: offsets (N) int64; of the first one past `end`
    on, in block 0."""
    at = first + tl.arange(0, N)
    if S % N == 0:  # the whole tile lies in one block
        block = tl.load(table + first // S).to(tl.int64)
        return block * pool_block + (at % S).to(tl.int64) * pool_slot
    block = tl.load(table + at // S, mask=at < end, other=0).to(tl.int64)
    return block * pool_block + (at % S).to(tl.int64) * pool_slot


@jit
def no_total(R: tl.constexpr, EXACT: tl.constexpr):  # type: ignore[no-untyped-def]
    """The running total before the first tile: (R), or the same in each of (R, 16)."""
    if EXACT:
        return tl.zeros((R, 16), tl.float32)
    else:
        return tl.zeros((R,), tl.float32)


@jit
def given_total(total, EXACT: tl.constexpr):  # type: ignore[no-untyped-def]
    """A total (R) as a running one."""
    if EXACT:
        return tl.broadcast_to(total[:, None], (total.shape[0], 16))
    else:
        return total


@jit
def row_total(total, EXACT: tl.constexpr):  # type: ignore[no-untyped-def]
    """A running total as (R)."""
    if EXACT:
        return tl.max(total, 1)
    else:
        return total


@jit
def divided(acc, total, EXACT: tl.constexpr):  # type: ignore[no-untyped-def]
    """acc / total; 0 for rows that saw nothing."""
    total = row_total(total, EXACT)
    return acc / tl.where(total == 0.0, 1.0, total)[:, None]


@jit
def fold(  # type: ignore[no-untyped-def]
    acc, peak, total, s, v, scale, EXACT: tl.constexpr, PRECISION: tl.constexpr
):
    """(acc, peak, total) after a tile: s = q k^T (R, N), -inf where a key is not seen; v (N, DP)."""
    new_peak = tl.maximum(peak, tl.max(s, 1) * scale)
    # A row that has seen nothing yet has a peak of -inf; -inf - -inf is not a number.
    base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    w = tl.math.exp2(s * scale - base[:, None])
    fade = tl.math.exp2(peak - base)
    if EXACT:
        ones = tl.full((v.shape[0], 16), 1.0, v.dtype)
        total = product(w.to(v.dtype), ones, total * fade[:, None], PRECISION)
    else:
        total = total * fade + tl.sum(w, 1)
    acc = product(w.to(v.dtype), v, acc * fade[:, None], PRECISION)
    return acc, new_peak, total


@jit
def attend_tile(  # type: ignore[no-untyped-def]
    acc,
    peak,
    total,
    q,
    row_position,
    heads,
    table,
    first,
    low,
    end,
    scale,
    pool_block,
    pool_slot,
    pool_values,
    S: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    N: tl.constexpr,
    WINDOW: tl.constexpr,
    MASKED: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(acc, peak, total) after the keys [first, first + N); `heads` points at this head's keys in block 0.

    MASKED: rows see keys up to their own position, inside their window, before `end`, and no key below `low` is seen by
    any; else the caller knows that every row sees every key of the tile, and the values are the same as with a mask.
    """
    at = first + tl.arange(0, N)
    column = tl.arange(0, DP)
    rows = tile_rows(table, first, end, pool_block, pool_slot, S, N)
    keys = heads + rows[:, None] + column[None, :]
    if MASKED:
        stored = at < end
        if WINDOW > 0:
            stored = stored & (at >= low)
        stored = stored[:, None] & (column < D)[None, :]
        k = tl.load(keys, mask=stored, other=0.0)
        v = tl.load(keys + pool_values, mask=stored, other=0.0)
    elif D != DP:
        k = tl.load(keys, mask=(column < D)[None, :], other=0.0)
        v = tl.load(keys + pool_values, mask=(column < D)[None, :], other=0.0)
    else:
        k = tl.load(keys)
        v = tl.load(keys + pool_values)
    s = product(q, tl.trans(k), tl.zeros((q.shape[0], N), tl.float32), PRECISION)
    if MASKED:
        seen = (at[None, :] <= row_position[:, None]) & (at < end)[None, :]
        if WINDOW > 0:
            seen = seen & (at[None, :] > row_position[:, None] - WINDOW)
        s = tl.where(seen, s, float("-inf"))
    return fold(acc, peak, total, s, v, scale, EXACT, PRECISION)


@jit
def attend_page(  # type: ignore[no-untyped-def]
    acc,
    peak,
    total,
    q,
    pages,
    key_column,
    value_column,
    table,
    first,
    scale,
    S: tl.constexpr,
    N: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`attend_tile` without a mask, where N divides S and D is a power of two: `pages` describes the pool as a matrix
    (blocks * S, 2 * K * D) in tiles of (N, D), which the copy engine fetches whole."""
    row = tl.load(table + first // S) * S + first % S
    k = pages.load([row, key_column])
    v = pages.load([row, value_column])
    s = product(q, tl.trans(k), tl.zeros((q.shape[0], N), tl.float32), PRECISION)
    return fold(acc, peak, total, s, v, scale, EXACT, PRECISION)
