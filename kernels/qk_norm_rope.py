"""From the fused projection of an attention layer to rotated queries, and keys and values in the paged pool.

For every token and head, with x the head's D features, cos and sin those of the token's position:

    x  = round(weight * round(x / sqrt(mean(x^2) + eps)))        queries and keys, where the model norms them
    x' = round(round(x * cos) + round(swap(x) * sin))            queries and keys; swap(a, b) = (-b, a) by halves of
                                                                 the first R features; the others are not rotated
    pool[slot] = keys', values                                   where the slot is not negative

`round` is to the tensors' dtype; statistics are float32. Values depend on the token alone.

T tokens, H query heads, K KV heads, D head size, R features of a head that are rotated (all, but for families with
partial rotation), P positions, S block size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .launching import chaining, jit, launching_on, next_power_of_two, take_turn, tl


def rotary_table(frequencies: torch.Tensor, num_positions: int, dtype: torch.dtype) -> torch.Tensor:
    """(P, R): cosines of positions 0 to P - 1 in the first half, sines in the second, for frequencies (R / 2) float32.

    Made in float32 and rounded once. A table, so that what a layer reads has the bits that torch computes.
    """
    positions = torch.arange(num_positions, device=frequencies.device)
    angles = positions[:, None].float() * frequencies
    return torch.cat((angles.cos().to(dtype), angles.sin().to(dtype)), dim=-1)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadNorms:
    """Weights of the norms of queries and keys."""

    query: torch.Tensor
    """(D)."""
    key: torch.Tensor
    """(D)."""
    eps: float
    """Added to the mean square."""


@jit
def _norm_half(  # type: ignore[no-untyped-def]
    low, high, weight, eps, at_low, at_high, inside, D: tl.constexpr
):
    """Both halves (N, DP / 2) of some heads, normed and scaled; `at_low` and `at_high` say which features they are."""
    square = tl.sum(low * low, 1) + tl.sum(high * high, 1)
    scale = tl.rsqrt(square / D + eps)[:, None]
    low_weight = tl.load(weight + at_low, mask=inside, other=0.0)
    high_weight = tl.load(weight + at_high, mask=inside, other=0.0)
    dtype = low_weight.dtype
    low = (low * scale).to(dtype).to(tl.float32) * low_weight.to(tl.float32)[None, :]
    high = (high * scale).to(dtype).to(tl.float32) * high_weight.to(tl.float32)[None, :]
    return low.to(dtype).to(tl.float32), high.to(dtype).to(tl.float32)


@jit
def _rope_kernel(  # type: ignore[no-untyped-def]
    qkv,
    q_out,
    pool,
    table,
    positions,
    slots,
    query_weight,
    key_weight,
    eps,
    qkv_stride,
    q_stride,
    block_stride,
    slot_stride,
    value_stride,
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """HEADS heads of one kind (queries, keys or values) of one token."""
    if CHAINED:
        take_turn()
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    query_parts: tl.constexpr = (H + HEADS - 1) // HEADS
    kv_parts: tl.constexpr = (K + HEADS - 1) // HEADS
    column = tl.arange(0, HALF)
    inside = column < D // 2
    # Features are taken in pairs that rotate together; those that do not rotate are the last pairs.
    at_low, at_high = column, column + D // 2
    if R < D:
        at_low = tl.where(column < R // 2, column, column + R // 2)
        at_high = tl.where(column < R // 2, column + R // 2, column + D // 2)
    is_query = part < query_parts
    is_value = part >= query_parts + kv_parts
    kind = tl.where(is_query, 0, tl.where(is_value, 2, 1))
    first = part - tl.where(is_query, 0, query_parts + tl.where(is_value, kv_parts, 0))
    head = first * HEADS + tl.arange(0, HEADS)
    mask = (head < tl.where(is_query, H, K))[:, None] & inside[None, :]
    before = tl.where(is_query, 0, H + tl.where(is_value, K, 0))
    at = qkv + token * qkv_stride + (before + head)[:, None] * D
    low = tl.load(at + at_low[None, :], mask=mask, other=0.0)
    high = tl.load(at + at_high[None, :], mask=mask, other=0.0)
    if kind < 2:
        dtype = low.dtype
        a, b = low.to(tl.float32), high.to(tl.float32)
        if HAS_NORM:
            weight = query_weight
            if kind == 1:
                weight = key_weight
            a, b = _norm_half(a, b, weight, eps, at_low, at_high, inside, D)
        row = table + tl.load(positions + token).to(tl.int64) * R + column
        cos = tl.load(row, mask=column < R // 2, other=1.0).to(tl.float32)[None, :]
        sin = tl.load(row + R // 2, mask=column < R // 2, other=0.0).to(tl.float32)[None, :]
        a_sin, b_sin = (a * sin).to(dtype).to(tl.float32), (b * sin).to(dtype).to(tl.float32)
        a_cos, b_cos = (a * cos).to(dtype).to(tl.float32), (b * cos).to(dtype).to(tl.float32)
        low, high = (a_cos - b_sin).to(dtype), (b_cos + a_sin).to(dtype)
    if kind == 0:
        to = q_out + token * q_stride + head[:, None] * D
        tl.store(to + at_low[None, :], low, mask=mask)
        tl.store(to + at_high[None, :], high, mask=mask)
    else:
        slot = tl.load(slots + token).to(tl.int64)
        if slot >= 0:
            to = pool + (slot // S) * block_stride + (slot % S) * slot_stride
            to += (kind - 1) * value_stride + head[:, None] * D
            tl.store(to + at_low[None, :], low.to(pool.dtype.element_ty), mask=mask)
            tl.store(to + at_high[None, :], high.to(pool.dtype.element_ty), mask=mask)


def rotate_and_store(
    qkv: torch.Tensor,
    pool: torch.Tensor,
    table: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    *,
    norms: HeadNorms | None = None,
    q_out: torch.Tensor | None = None,
) -> torch.Tensor:
    """qkv (T, (H + 2 K) D), queries before keys before values: queries go to q_out (T, H D), keys and values to the
    pool. One launch.

    pool (blocks, S, 2, K, D), any strides between its blocks and slots, keys of one slot contiguous; table (P, R) of
    `rotary_table` in qkv's dtype; positions (T) below P; slots (T), `block * S + offset`, -1: a row of padding, of
    which nothing is stored; both int32 or int64. Without `q_out` queries are rotated in place; keys in qkv stay as
    they were. Returns the queries, (T, H D).
    """
    num_tokens = qkv.shape[0]
    block_size, _, num_kv_heads, size = pool.shape[1:]
    num_heads = qkv.shape[1] // size - 2 * num_kv_heads
    queries = qkv[:, : num_heads * size] if q_out is None else q_out
    assert qkv.shape[1] == (num_heads + 2 * num_kv_heads) * size and num_heads > 0
    assert queries.shape == (num_tokens, num_heads * size)
    assert qkv.stride(1) == queries.stride(1) == pool.stride(4) == 1 and pool.stride(3) == size
    assert (
        table.shape[1] <= size
        and table.shape[1] % 2 == 0
        and table.is_contiguous()
        and table.dtype == qkv.dtype
    )
    assert positions.shape == slots.shape == (num_tokens,)
    if num_tokens == 0:
        return queries
    half = next_power_of_two(size // 2)
    # A warp per program and 16 elements per thread; a function of the head size alone, so that sums have one order.
    heads = max(256 // half, 1)
    parts = -(-num_heads // heads) + 2 * -(-num_kv_heads // heads)
    kernel: Any = _rope_kernel
    with launching_on(qkv):
        kernel[(num_tokens, parts)](
            qkv,
            queries,
            pool,
            table,
            positions,
            slots,
            norms.query if norms else qkv,
            norms.key if norms else qkv,
            norms.eps if norms else 0.0,
            qkv.stride(0),
            queries.stride(0),
            pool.stride(0),
            pool.stride(1),
            pool.stride(2),
            H=num_heads,
            K=num_kv_heads,
            D=size,
            R=table.shape[1],
            S=block_size,
            HALF=half,
            HEADS=heads,
            HAS_NORM=norms is not None,
            num_warps=1,
            enable_fp_fusion=False,  # products are rounded before they are added, also in float32
            **chaining(qkv, num_tokens),
        )
    return queries


def reference(
    qkv: torch.Tensor,
    table: torch.Tensor,
    positions: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    norms: HeadNorms | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotated queries (T, H, D), and keys and values (T, 2, K, D), in torch operations."""
    rotated = table.shape[1]
    heads = qkv.view(qkv.shape[0], num_heads + 2 * num_kv_heads, -1)
    queries, keys, values = heads.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    if norms is not None:
        queries = _reference_norm(queries, norms.query, norms.eps)
        keys = _reference_norm(keys, norms.key, norms.eps)
    cos, sin = table[positions].unsqueeze(1).chunk(2, -1)

    def rotate(x: torch.Tensor) -> torch.Tensor:
        low, high = x[..., :rotated].chunk(2, -1)
        turned = (low * cos - high * sin, high * cos + low * sin)
        return torch.cat((*turned, x[..., rotated:]), -1)

    return rotate(queries), torch.stack((rotate(keys), values), 1)


def _reference_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    return (wide * (wide.pow(2).mean(-1, keepdim=True) + eps).rsqrt()).to(x.dtype) * weight
