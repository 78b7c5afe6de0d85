"""The feed-forward layers of experts, over tokens sorted by expert: four launches, and nothing waits for the host.

    inner = round(round(silu(round(x gate^T))) * round(x up^T))        for each token and each of its experts
    each  = round(inner down^T)
    out   = round(sum over its experts, in the order of `ids`, of weight * each)

`round` is to the tensors' dtype; sums are float32. Experts that are not here add nothing. Values depend on the token
alone, as far as products of tiles of several shapes have the same bits; with `EXACT`, which is one shape, they do.

T tokens, E hidden size, X experts here, k experts of a token, I width of an expert, M = T k rows, B tiles of rows.
"""

from __future__ import annotations

from typing import Any

import torch

from .attention_tiles import precision, product
from .expert_configs import ExpertConfig, TileConfig, expert_config
from .expert_routing import Tiles, sort_rows
from .launching import chaining, jit, launching_on, next_power_of_two, take_turn, tl


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
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """ROWS places of one expert, COLUMNS of its width: gate, up, and their product. WHOLE: no tile is cut off."""
    if CHAINED:
        take_turn()
    tile = tl.program_id(1)
    expert = tl.load(tile_experts + tile).to(tl.int64)
    if expert < num_experts:
        place = tl.load(tile_first + tile) + tl.arange(0, ROWS)
        known = place < tl.load(tile_end + tile)
        token = (tl.load(order + place, mask=known, other=0) // TOP_K).to(tl.int64)
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
            if WHOLE:
                rows = tl.load(at_x + done, mask=known[:, None], other=0.0)
                gates = tl.load(at_gate + done)
                ups = tl.load(at_up + done)
            else:
                left = depth < DEPTH - done
                mask = left[:, None] & inside[None, :]
                rows = tl.load(at_x + done, mask=known[:, None] & left[None, :], other=0.0)
                gates = tl.load(at_gate + done, mask=mask, other=0.0)
                ups = tl.load(at_up + done, mask=mask, other=0.0)
            gate = product(rows, gates, gate, PRECISION)
            up = product(rows, ups, up, PRECISION)
        dtype = inner.dtype.element_ty
        wide = gate.to(dtype).to(tl.float32)
        gated = (wide / (1.0 + tl.exp(-wide))).to(dtype).to(tl.float32)
        gated_up = (gated * up.to(dtype).to(tl.float32)).to(dtype)
        to = inner + place[:, None].to(tl.int64) * SIZE + column[None, :]
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
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """ROWS places of one expert, COLUMNS of the output, each to its unsorted row. WHOLE: no tile is cut off."""
    if CHAINED:
        take_turn()
    tile = tl.program_id(1)
    expert = tl.load(tile_experts + tile).to(tl.int64)
    if expert < num_experts:
        place = tl.load(tile_first + tile) + tl.arange(0, ROWS)
        known = place < tl.load(tile_end + tile)
        column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        inside = column < SIZE
        depth = tl.arange(0, STEP)
        at_inner = inner + place[:, None].to(tl.int64) * DEPTH + depth[None, :]
        at_weight = weight + expert * expert_stride + column[None, :].to(tl.int64) * DEPTH
        at_weight += depth[:, None]
        total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for done in range(0, DEPTH, STEP):
            if WHOLE:
                rows = tl.load(at_inner + done, mask=known[:, None], other=0.0)
                columns = tl.load(at_weight + done)
            else:
                left = depth < DEPTH - done
                mask = left[:, None] & inside[None, :]
                rows = tl.load(at_inner + done, mask=known[:, None] & left[None, :], other=0.0)
                columns = tl.load(at_weight + done, mask=mask, other=0.0)
            total = product(rows, columns, total, PRECISION)
        row = tl.load(order + place, mask=known, other=0).to(tl.int64)
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
    CHAINED: tl.constexpr,
):
    """COLUMNS of one token."""
    if CHAINED:
        take_turn()
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < SIZE
    total = tl.zeros((COLUMNS,), dtype=tl.float32)
    for k in tl.static_range(TOP_K):
        row = token * TOP_K + k
        expert = tl.load(ids + row) - first_expert
        known = tl.where((expert >= 0) & (expert < num_experts), SIZE, 0)
        value = tl.load(each + row * SIZE + column, mask=column < known, other=0.0)
        total += tl.load(weights + row) * value.to(tl.float32)
    tl.store(out + token * SIZE + column, total.to(out.dtype.element_ty), mask=inside)


def gate_up_product(
    x: torch.Tensor, gate_up: torch.Tensor, tiles: Tiles, rows: int, config: TileConfig
) -> torch.Tensor:
    """x (T, E), gate_up (X, 2 I, E) -> inner (M, I), in the order of `tiles`, which have `rows` rows."""
    num_experts, both, depth = gate_up.shape
    size = both // 2
    inner = torch.empty((len(tiles.order), size), dtype=x.dtype, device=x.device)
    kernel: Any = _gate_up_kernel
    kernel[(-(-size // config.columns), len(tiles.experts))](
        *(x, gate_up, inner, tiles.order, tiles.experts, tiles.first, tiles.end),
        *(x.stride(0), gate_up.stride(0), size, depth, num_experts),
        TOP_K=tiles.top_k,
        **_options(x, rows, size, depth, config),
    )
    return inner


def down_product(
    inner: torch.Tensor, down: torch.Tensor, tiles: Tiles, rows: int, config: TileConfig
) -> torch.Tensor:
    """inner (M, I), down (X, E, I) -> each (M, E), in the order of the unsorted rows."""
    num_experts, size, depth = down.shape
    each = torch.empty((len(inner), size), dtype=inner.dtype, device=inner.device)
    kernel: Any = _down_kernel
    kernel[(-(-size // config.columns), len(tiles.experts))](
        *(inner, down, each, tiles.order, tiles.experts, tiles.first, tiles.end),
        *(down.stride(0), size, depth, num_experts),
        **_options(inner, rows, size, depth, config),
    )
    return each


def _options(
    x: torch.Tensor, rows: int, size: int, depth: int, config: TileConfig
) -> dict[str, Any]:
    return {
        "ROWS": rows,
        "COLUMNS": config.columns,
        "STEP": config.depth,
        "WHOLE": size % config.columns == 0 and depth % config.depth == 0,
        "PRECISION": precision(x.dtype, x.device),
        "num_warps": config.warps,
        "num_stages": config.stages,
        **chaining(x),
    }


def grouped_experts(
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    *,
    first_expert: int = 0,
    config: ExpertConfig | None = None,
) -> torch.Tensor:
    """x (T, E), weights (T, k) float32, ids (T, k) int64, gate_up (X, 2 I, E), down (X, E, I) -> a new (T, E).

    `ids` count from the first expert of all ranks; those here begin with `first_expert`. Matrices contiguous, of x's
    dtype. `config`: None chooses by the sizes and the device.
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
    if config is None:
        config = expert_config(
            x.device, num_rows=ids.numel(), num_experts=num_experts, dtype=x.dtype
        )
    kernel: Any = _combine_kernel
    with launching_on(x):
        tiles = sort_rows(ids, first_expert, num_experts, config.rows)
        inner = gate_up_product(x, gate_up, tiles, config.rows, config.gate_up)
        each = down_product(inner, down, tiles, config.rows, config.down)
        columns = min(1024, next_power_of_two(hidden))
        kernel[(num_tokens, -(-hidden // columns))](
            *(each, weights, ids, out, first_expert, num_experts, hidden),
            TOP_K=top_k,
            COLUMNS=columns,
            num_warps=4,
            **chaining(x),
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
