"""The feed-forward layers of experts, over tokens sorted by expert: a few launches, and nothing waits for the host.

    inner = round(round(silu(round(x gate^T))) * round(x up^T))        for each token and each of its experts
    each  = round(inner down^T)
    out   = round(sum over its experts, in the order of `ids`, of weight * each)

`round` is to the tensors' dtype; sums are float32. Experts that are not here add nothing. Values depend on the token
alone, as far as products of tiles of 16 and of 64 rows have the same bits.

T tokens, E hidden size, X experts here, k experts of a token, I width of an expert, M = T k rows, B tiles of rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .attention_tiles import precision, product
from .launching import jit, launching_on, next_power_of_two, tl

_FEW_ROWS = 32
"""Rows for each expert, on average, up to which tiles are small."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TileConfig:
    """The sizes of a program's part."""

    rows: int
    """Of one expert."""
    columns: int
    """Of the output."""
    depth: int
    """Inputs at once."""
    num_warps: int
    """Of a program."""
    num_stages: int
    """Loads under way."""


SMALL_BATCH = TileConfig(rows=16, columns=64, depth=128, num_warps=4, num_stages=4)
"""Decodes: a tile has few rows, and time goes into reading the experts' matrices once."""
LARGE_BATCH = TileConfig(rows=64, columns=128, depth=64, num_warps=8, num_stages=3)
"""Prefills: the products themselves."""


def choose_config(num_rows: int, num_experts: int) -> TileConfig:
    """From numbers that the host knows."""
    return SMALL_BATCH if num_rows <= _FEW_ROWS * num_experts else LARGE_BATCH


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """Rows sorted by expert, cut into tiles of one expert each; all on the device."""

    order: torch.Tensor
    """(M) int64: which row of the unsorted ones, token * k + which of its experts, is at each place."""
    experts: torch.Tensor
    """(B) int64: whose rows they are; X: a tile that is not needed."""
    first: torch.Tensor
    """(B) int64: first place."""
    end: torch.Tensor
    """(B) int64: one past the expert's last place."""
    top_k: int
    """k."""


def sort_rows(ids: torch.Tensor, first_expert: int, num_experts: int, rows: int) -> Tiles:
    """ids (T, k) of all experts -> tiles of `rows` rows for those from `first_expert` on, `num_experts` of them.

    As many tiles as there can be, whatever `ids` say, so that a graph can hold what works them off.
    """
    local = ids.flatten().to(torch.int64) - first_expert
    absent = (local < 0) | (local >= num_experts)
    local = torch.where(absent, num_experts, local)
    num_tiles = min(-(-local.numel() // rows) + num_experts, local.numel())
    order = local.argsort(stable=True)
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=ids.device)
    counts = counts.scatter_add_(0, local, torch.ones_like(local))
    ends = counts.cumsum(0)
    tiles_until = ((counts[:num_experts] + rows - 1) // rows).cumsum(0)
    number = torch.arange(num_tiles, device=ids.device)
    experts = torch.searchsorted(tiles_until, number, right=True)
    here = experts.clamp(max=num_experts - 1)
    tiles_before = tiles_until[here] - (counts[here] + rows - 1) // rows
    first = ends[here] - counts[here] + (number - tiles_before) * rows
    return Tiles(order=order, experts=experts, first=first, end=ends[here], top_k=ids.shape[1])


@jit
def _gate_up_kernel(  # type: ignore[no-untyped-def]
    x,
    weight,
    inner,
    order,
    tile_experts,
    tile_first,
    tile_end,
    x_stride,
    expert_stride,
    SIZE,
    DEPTH,
    num_experts,
    TOP_K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """ROWS places of one expert, COLUMNS of its width: gate, up, and their product."""
    tile = tl.program_id(1)
    expert = tl.load(tile_experts + tile)
    if expert < num_experts:
        place = tl.load(tile_first + tile) + tl.arange(0, ROWS)
        known = place < tl.load(tile_end + tile)
        token = tl.load(order + place, mask=known, other=0) // TOP_K
        column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        inside = column < SIZE
        depth = tl.arange(0, STEP)
        at_x = x + token[:, None] * x_stride + depth[None, :]
        at_gate = weight + expert * expert_stride + column[None, :].to(tl.int64) * DEPTH
        at_gate += depth[:, None]
        at_up = at_gate + SIZE.to(tl.int64) * DEPTH
        gate = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        up = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for done in range(0, DEPTH, STEP):
            left = depth < DEPTH - done
            rows = tl.load(at_x + done, mask=known[:, None] & left[None, :], other=0.0)
            mask = left[:, None] & inside[None, :]
            gates = tl.load(at_gate + done, mask=mask, other=0.0)
            ups = tl.load(at_up + done, mask=mask, other=0.0)
            gate = product(rows, gates, gate, PRECISION)
            up = product(rows, ups, up, PRECISION)
        dtype = inner.dtype.element_ty
        wide = gate.to(dtype).to(tl.float32)
        gated = (wide / (1.0 + tl.exp(-wide))).to(dtype).to(tl.float32)
        gated_up = (gated * up.to(dtype).to(tl.float32)).to(dtype)
        to = inner + place[:, None] * SIZE + column[None, :]
        tl.store(to, gated_up, mask=known[:, None] & inside[None, :])


@jit
def _down_kernel(  # type: ignore[no-untyped-def]
    inner,
    weight,
    each,
    order,
    tile_experts,
    tile_first,
    tile_end,
    expert_stride,
    SIZE,
    DEPTH,
    num_experts,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """ROWS places of one expert, COLUMNS of the output, each to its unsorted row."""
    tile = tl.program_id(1)
    expert = tl.load(tile_experts + tile)
    if expert < num_experts:
        place = tl.load(tile_first + tile) + tl.arange(0, ROWS)
        known = place < tl.load(tile_end + tile)
        column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        inside = column < SIZE
        depth = tl.arange(0, STEP)
        at_inner = inner + place[:, None] * DEPTH + depth[None, :]
        at_weight = weight + expert * expert_stride + column[None, :].to(tl.int64) * DEPTH
        at_weight += depth[:, None]
        total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for done in range(0, DEPTH, STEP):
            left = depth < DEPTH - done
            rows = tl.load(at_inner + done, mask=known[:, None] & left[None, :], other=0.0)
            mask = left[:, None] & inside[None, :]
            columns = tl.load(at_weight + done, mask=mask, other=0.0)
            total = product(rows, columns, total, PRECISION)
        row = tl.load(order + place, mask=known, other=0)
        to = each + row[:, None] * SIZE + column[None, :]
        tl.store(to, total.to(each.dtype.element_ty), mask=known[:, None] & inside[None, :])


@jit
def _combine_kernel(  # type: ignore[no-untyped-def]
    each,
    weights,
    ids,
    out,
    first_expert,
    num_experts,
    SIZE,
    TOP_K: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """COLUMNS of one token."""
    token = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < SIZE
    total = tl.zeros((COLUMNS,), dtype=tl.float32)
    for k in tl.static_range(TOP_K):
        row = token * TOP_K + k
        expert = tl.load(ids + row) - first_expert
        known = tl.where((expert >= 0) & (expert < num_experts), SIZE, 0)
        value = tl.load(each + row * SIZE + column, mask=column < known, other=0.0)
        total += tl.load(weights + row) * value.to(tl.float32)
    tl.store(out + token * SIZE + column, total.to(out.dtype.element_ty), mask=inside)


def grouped_experts(
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    *,
    first_expert: int = 0,
    config: TileConfig | None = None,
) -> torch.Tensor:
    """x (T, E), weights (T, k) float32, ids (T, k) int64, gate_up (X, 2 I, E), down (X, E, I) -> a new (T, E).

    `ids` count from the first expert of all ranks; those here begin with `first_expert`. Matrices contiguous, of x's
    dtype. `config`: None chooses by the sizes.
    """
    num_tokens, top_k = ids.shape
    num_experts, hidden, size = down.shape
    assert x.shape == (num_tokens, hidden) and x.stride(1) == 1
    assert gate_up.shape == (num_experts, 2 * size, hidden)
    assert (
        gate_up.is_contiguous() and down.is_contiguous() and x.dtype == gate_up.dtype == down.dtype
    )
    assert weights.shape == ids.shape and weights.dtype == torch.float32
    out = torch.empty((num_tokens, hidden), dtype=x.dtype, device=x.device)
    if not num_tokens:
        return out
    ids, weights = ids.contiguous(), weights.contiguous()
    config = config or choose_config(ids.numel(), num_experts)
    tiles = sort_rows(ids, first_expert, num_experts, config.rows)
    inner = torch.empty((ids.numel(), size), dtype=x.dtype, device=x.device)
    each = torch.empty((ids.numel(), hidden), dtype=x.dtype, device=x.device)
    shared: dict[str, Any] = {
        "ROWS": config.rows,
        "COLUMNS": config.columns,
        "STEP": config.depth,
        "PRECISION": precision(x.dtype, x.device),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    where = (tiles.order, tiles.experts, tiles.first, tiles.end)
    first, second, third = (_gate_up_kernel, _down_kernel, _combine_kernel)
    kernels: Any = first, second, third
    num_tiles = len(tiles.experts)
    with launching_on(x):
        kernels[0][(-(-size // config.columns), num_tiles)](
            *(x, gate_up, inner, *where, x.stride(0), gate_up.stride(0), size, hidden, num_experts),
            TOP_K=top_k,
            **shared,
        )
        kernels[1][(-(-hidden // config.columns), num_tiles)](
            *(inner, down, each, *where, down.stride(0), hidden, size, num_experts), **shared
        )
        columns = min(1024, next_power_of_two(hidden))
        kernels[2][(-(-hidden // columns), num_tokens)](
            *(each, weights, ids, out, first_expert, num_experts, hidden),
            TOP_K=top_k,
            COLUMNS=columns,
            num_warps=4,
        )
    return out


def reference(
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    *,
    first_expert: int = 0,
) -> torch.Tensor:
    """The formula in torch operations, in float32 or wider, without its roundings."""
    wide = torch.promote_types(x.dtype, torch.float32)
    out = torch.zeros(x.shape, dtype=wide, device=x.device)
    for index in range(len(down)):
        tokens, which = torch.where(ids == first_expert + index)
        both = x[tokens].to(wide) @ gate_up[index].to(wide).T
        gate, up = both.chunk(2, -1)
        product = (torch.nn.functional.silu(gate) * up) @ down[index].to(wide).T
        out.index_add_(0, tokens, product * weights[tokens, which, None].to(wide))
    return out
