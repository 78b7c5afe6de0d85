"""Which experts a token goes to, and their rows sorted by expert: one launch each, and nothing waits for the host.

    score  = softmax(logits) or sigmoid(logits)
    ids    = the k greatest of score + bias, of the groups that may be chosen from
    weight = score / (sum of the chosen scores) * scale

T tokens, X experts, k experts of a token, M = T k rows, R rows of a tile, B tiles.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .launching import chaining, jit, launching_on, next_power_of_two, take_turn, tl

_BLOCK = 4096
"""Rows that a program of `sort_rows` looks at; more are counted by a launch before it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """How experts are chosen from their logits."""

    top_k: int
    """k."""
    sigmoid: bool
    """Scores are sigmoids, not a softmax."""
    normalise: bool
    """Divide the chosen scores by their sum."""
    scale: float
    """Factor of the weights."""
    num_groups: int
    """Groups of neighbouring experts."""
    top_groups: int
    """Groups that may be chosen from: those whose two best experts score most."""
    rounded: bool
    """Round weights to the logits' dtype."""


@jit
def _allowed_groups(choice, column, per_group, GROUPS: tl.constexpr, TOP: tl.constexpr, PADDED: tl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip
    """`choice` without the experts of groups that are not among the TOP best; the lower one of equals first."""
    group = column // per_group
    numbers = tl.arange(0, PADDED)
    best = tl.full((PADDED,), float("-inf"), tl.float32)
    for number in tl.static_range(GROUPS):
        own = tl.where(group == number, choice, float("-inf"))
        first = tl.max(own, 0)
        second = tl.max(tl.where(column == tl.argmax(own, 0), float("-inf"), own), 0)
        best = tl.where(numbers == number, first + second, best)
    allowed = group < 0
    for _ in tl.static_range(TOP):
        winner = tl.argmax(best, 0)
        allowed = allowed | (group == winner)
        best = tl.where(numbers == winner, float("-inf"), best)
    return tl.where(allowed, choice, float("-inf"))


@jit
def _route_kernel(  # type: ignore[no-untyped-def]
    logits,
    bias,
    weights,
    ids,
    slots,
    routes,
    row_stride,
    num_experts,
    scale,
    route_stride,
    TOP_K: tl.constexpr,
    CHOSEN: tl.constexpr,
    BINS: tl.constexpr,
    SIGMOID: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NORMALISE: tl.constexpr,
    ROUNDED: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    PADDED_GROUPS: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    HAS_ROUTES: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """One token. Its slot below 0: it is padding, and goes nowhere."""
    if CHAINED:
        take_turn()
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BINS)
    inside = column < num_experts
    logit = tl.load(logits + token * row_stride + column, mask=inside, other=float("-inf"))
    wide = logit.to(tl.float32)
    if SIGMOID:
        score = tl.div_rn(1.0, 1.0 + tl.exp(-wide))
    else:
        power = tl.exp(wide - tl.max(wide, 0))
        score = tl.div_rn(power, tl.sum(power, 0))
    choice = score
    if HAS_BIAS:
        choice += tl.load(bias + column, mask=inside, other=0.0)
    choice = tl.where(inside, choice, float("-inf"))
    if GROUPS > 1:
        choice = _allowed_groups(choice, column, num_experts // GROUPS, GROUPS, TOP_GROUPS, PADDED_GROUPS)  # fmt: skip
    pick = tl.arange(0, CHOSEN)
    chosen = tl.zeros((CHOSEN,), tl.float32)
    which = tl.zeros((CHOSEN,), tl.int32)
    for k in tl.static_range(TOP_K):
        best = tl.argmax(choice, 0)
        chosen = tl.where(pick == k, tl.sum(tl.where(column == best, score, 0.0), 0), chosen)
        which = tl.where(pick == k, best, which)
        choice = tl.where(column == best, float("-inf"), choice)
    which = tl.minimum(which, num_experts - 1)  # scores that are not numbers
    if NORMALISE:
        total = tl.sum(chosen, 0)
        if SIGMOID:
            total += 1e-20
        chosen = tl.div_rn(chosen, total + tl.zeros((CHOSEN,), tl.float32))
    chosen *= scale
    if ROUNDED:
        chosen = chosen.to(logits.dtype.element_ty).to(tl.float32)
    known = pick < TOP_K
    if HAS_SLOTS:
        slot = tl.load(slots + token).to(tl.int64)
        if HAS_ROUTES:
            most = tl.where(slot >= 0, TOP_K, 0)
            to = routes + slot * route_stride + pick
            tl.store(to, which.to(routes.dtype.element_ty), mask=pick < most)
        which = tl.maximum(which, tl.where(slot >= 0, 0, num_experts))
    tl.store(weights + token * TOP_K + pick, chosen, mask=known)
    tl.store(ids + token * TOP_K + pick, which.to(tl.int64), mask=known)


def choose_experts(
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    routing: Routing,
    *,
    slots: torch.Tensor | None = None,
    routes: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """logits (T, X), bias (X) float32 -> weights (T, k) float32 and ids (T, k) int64, in the order of their scores.

    Equal scores: the lower expert first. `slots` (T): a token of padding has one below 0, and the id X. `routes`
    (slots, k), any integers, with a stride: ids go there too, at the tokens' slots.
    """
    num_tokens, num_experts = logits.shape
    top_k = routing.top_k
    assert logits.stride(1) == 1 and (routes is None or slots is not None)
    weights = torch.empty((num_tokens, top_k), dtype=torch.float32, device=logits.device)
    ids = torch.empty((num_tokens, top_k), dtype=torch.int64, device=logits.device)
    if not num_tokens:
        return weights, ids
    kernel: Any = _route_kernel
    with launching_on(logits):
        kernel[(num_tokens,)](
            logits,
            logits if bias is None else bias,
            weights,
            ids,
            ids if slots is None else slots,
            ids if routes is None else routes,
            logits.stride(0),
            num_experts,
            float(routing.scale),
            0 if routes is None else routes.stride(0),
            TOP_K=top_k,
            CHOSEN=next_power_of_two(top_k),
            BINS=next_power_of_two(num_experts),
            SIGMOID=routing.sigmoid,
            HAS_BIAS=bias is not None,
            NORMALISE=routing.normalise,
            ROUNDED=routing.rounded,
            GROUPS=routing.num_groups,
            TOP_GROUPS=routing.top_groups,
            PADDED_GROUPS=next_power_of_two(routing.num_groups),
            HAS_SLOTS=slots is not None,
            HAS_ROUTES=routes is not None,
            num_warps=1,
            **chaining(logits),
        )
    return weights, ids


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """Rows sorted by expert, cut into tiles of one expert each; all int32 on the device."""

    order: torch.Tensor
    """(M): which row of the unsorted ones, token * k + which of its experts, is at each place."""
    experts: torch.Tensor
    """(B): whose rows they are; X: a tile that is not needed."""
    first: torch.Tensor
    """(B): first place."""
    end: torch.Tensor
    """(B): one past the expert's last place."""
    top_k: int
    """k."""


@jit
def _local(ids, row, num_rows, first_expert, num_experts):  # type: ignore[no-untyped-def]
    """The expert of each row as one of those here; X: it is not here."""
    local = tl.load(ids + row, mask=row < num_rows, other=-1).to(tl.int32) - first_expert
    return tl.where((local >= 0) & (local < num_experts), local, num_experts)


@jit(do_not_specialize=["num_rows"])
def _count_kernel(  # type: ignore[no-untyped-def]
    ids,
    counts,
    num_rows,
    first_expert,
    num_experts,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """How many of BLOCK rows go to each expert."""
    if CHAINED:
        take_turn()
    chunk = tl.program_id(0)
    row = chunk * BLOCK + tl.arange(0, BLOCK)
    found = tl.histogram(_local(ids, row, num_rows, first_expert, num_experts), BINS)
    tl.store(counts + chunk * BINS + tl.arange(0, BINS), found)


@jit(do_not_specialize=["num_rows", "num_tiles", "num_chunks"])
def _sort_kernel(  # type: ignore[no-untyped-def]
    ids,
    counts,
    order,
    tile_experts,
    tile_first,
    tile_end,
    num_rows,
    num_tiles,
    first_expert,
    num_experts,
    num_chunks,
    ROWS: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """One expert's rows among BLOCK, and with the first of them its tiles; the last programs' are those not needed."""
    if CHAINED:
        take_turn()
    expert = tl.program_id(0)
    chunk = tl.program_id(1)
    bins = tl.arange(0, BINS)
    row = chunk * BLOCK + tl.arange(0, BLOCK)
    # Rows beyond the last and rows of other ranks have a bin after all others.
    local = _local(ids, row, num_rows, first_expert, num_experts)
    if CHUNKS == 1:
        found = tl.histogram(local, BINS)
        earlier = tl.zeros((BINS,), tl.int32)
    else:
        line = tl.arange(0, CHUNKS)[:, None]
        table = tl.load(counts + line * BINS + bins[None, :], mask=line < num_chunks, other=0)
        found = tl.sum(table, 0)
        earlier = tl.sum(tl.where(line < chunk, table, 0), 0)
    tiles = tl.where(bins < num_experts, (found + ROWS - 1) // ROWS, 0)
    tile = tl.sum(tl.where(bins < expert, tiles, 0), 0)
    if expert < num_experts:
        count = tl.sum(tl.where(bins == expert, found, 0), 0)
        first = tl.sum(tl.where(bins < expert, found, 0), 0)
        if count > 0:
            mine = local == expert
            place = first + tl.sum(tl.where(bins == expert, earlier, 0), 0)
            tl.store(order + place + tl.cumsum(mine.to(tl.int32), 0) - 1, row, mask=mine)
            if chunk == 0:
                for number in range((count + ROWS - 1) // ROWS):
                    tl.store(tile_experts + tile + number, expert)
                    tl.store(tile_first + tile + number, first + number * ROWS)
                    tl.store(tile_end + tile + number, first + count)
    elif chunk == 0:
        for begin in range(0, num_tiles, BINS):
            mask = (begin + bins >= tile) & (begin + bins < num_tiles)
            tl.store(tile_experts + begin + bins, num_experts, mask=mask)


def sort_rows(ids: torch.Tensor, first_expert: int, num_experts: int, rows: int) -> Tiles:
    """ids (T, k) of all experts -> tiles of `rows` rows for those from `first_expert` on, `num_experts` of them.

    Within an expert rows keep their order. As many tiles as there can be, whatever `ids` say, so that a graph can hold
    what works them off.
    """
    num_rows = ids.numel()
    used = min(num_experts, num_rows)
    num_tiles = min((num_rows + used * (rows - 1)) // rows, num_rows)
    bins = next_power_of_two(num_experts + 1)
    block = min(_BLOCK, max(128, next_power_of_two(num_rows)))
    chunks = -(-num_rows // block)
    sizes = [num_rows, num_tiles, num_tiles, num_tiles, chunks * bins]
    # Each begins at 16 bytes, else kernels would be compiled for every way in which some of them do.
    padded = [-(-size // 4) * 4 for size in sizes]
    numbers = torch.empty(sum(padded), dtype=torch.int32, device=ids.device)
    parts = zip(numbers.split(padded), sizes, strict=True)
    order, experts, first, end, counts = (part[:size] for part, size in parts)
    kernels: Any = (_count_kernel, _sort_kernel)
    if num_rows:
        ids, shared = ids.contiguous(), {"BINS": bins, "BLOCK": block, **chaining(ids)}
        num_warps = 4 if block <= 1024 else 8
        with launching_on(ids):
            if chunks > 1:
                kernels[0][(chunks,)](
                    *(ids, counts, num_rows, first_expert, num_experts),
                    num_warps=num_warps,
                    **shared,
                )
            kernels[1][(num_experts + 1, chunks)](
                *(ids, counts, order, experts, first, end),
                *(num_rows, num_tiles, first_expert, num_experts, chunks),
                ROWS=rows,
                CHUNKS=next_power_of_two(chunks),
                num_warps=num_warps,
                **shared,
            )
    return Tiles(order=order, experts=experts, first=first, end=end, top_k=ids.shape[1])
