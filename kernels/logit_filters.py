"""top-k, top-p and min-p without a sort: for each row the least logit that may be drawn, and what that leaves.

With w(v) = exp((z(v) - max z) / T) of the edited logits z, v is left where

    z(v) >= b_k      b_k the k-th largest z                                                          (k > 0)
    z(v) >= b_p      b_p the largest z whose  sum over z(u) >= b_p of w(u)  reaches  p * the mass of the k largest,
                     or of all where there is no k                                                   (p < 1)
    w(v) >= min_p                                                                                    (min_p > 0)

so tokens that are exactly as likely as the last one that is left are left too.

Both bounds are the largest value at which a sum over everything from there up reaches a target: 1 for each token
(target k), or w. First the chunks' maxima and sums alone give a value that is certainly not above the bound. What lies
from there up is gathered, mostly a few hundred values, and halving the interval over the order of float32 numbers finds
the bound among them. Where it is too many, halvings over the whole row come first. Sums have a fixed order.

R rows, V vocabulary, C chunks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from . import logit_edits
from .launching import jit, launching_on, tl
from .logit_edits import LogitEdits, edit, is_edited
from .logit_stats import LogitStats, row_totals

CAPACITY = 8192
"""Values that are gathered at most, where memory is allocated for it."""
_CHUNKS = 8
"""Chunks of a tile."""
_WARPS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingFilters:
    """Filters of R rows; contiguous tensors on one device."""

    top_k: torch.Tensor
    """(R) int32; 0 or less, or V or more: all."""
    top_p: torch.Tensor
    """(R) float32; 1: all."""
    min_p: torch.Tensor
    """(R) float32; 0: all."""


def arguments(filters: SamplingFilters | None, placeholder: torch.Tensor) -> dict[str, Any]:
    """What a kernel takes for `filters`; None: `placeholder` everywhere, which is not read."""
    if filters is None:
        return {"top_k": placeholder, "top_p": placeholder, "min_p": placeholder, "FILTERS": False}
    parameters = {"top_k": filters.top_k, "top_p": filters.top_p, "min_p": filters.min_p}
    return {**parameters, "FILTERS": True}


@jit
def is_filtered(row, V, takes_largest, top_k, top_p, min_p):  # type: ignore[no-untyped-def]
    """Some filter of this row may leave tokens out."""
    k = tl.load(top_k + row)
    some = ((k > 0) & (k < V)) | (tl.load(top_p + row) < 1) | (tl.load(min_p + row) > 0)
    return some & (takes_largest == 0)


@jit
def _order(z):  # type: ignore[no-untyped-def]
    """int32 numbers in the order of float32 z, which is not NaN; both zeros are one."""
    bits = (z + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@jit
def _value(key):  # type: ignore[no-untyped-def]
    """The float32 at an int64 place in the order."""
    bits = tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.int32)
    return bits.to(tl.float32, bitcast=True)


@jit
def _kth_of_chunks(m, k):  # type: ignore[no-untyped-def]
    """The k-th largest of the chunks' maxima, which the k-th largest of the row cannot be below."""
    keys = _order(m)
    low = tl.min(keys, 0).to(tl.int64)
    high = tl.max(keys, 0).to(tl.int64) + 1
    while high - low > 1:
        middle = (low + high) >> 1
        reached = tl.sum((keys >= middle.to(tl.int32)).to(tl.int32), 0) >= k
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle)
    return _value(low)


@jit
def _floor_of_mass(  # type: ignore[no-untyped-def]
    m, peak, scale, weights, total, target, factor, V, CHUNK: tl.constexpr
):
    """A value that the bound of a mass `target` cannot be below.

    If every column had at most the weight (total - target) / V, together they would be what may be missing. Better:
    from z up lies, in each chunk whose maximum is not below z, at least that maximum, and at least the chunk's sum less
    CHUNK - 1 weights of z.
    """
    missing = tl.log2(tl.maximum((total - target) / V, 1e-30).to(tl.float32)) - 0.001
    low = peak + missing / factor - tl.abs(peak) * 1e-6
    high = peak
    for _ in range(12):
        middle = 0.5 * (low + high)
        weight = tl.exp2((middle - peak) * factor).to(tl.float64)
        least = tl.maximum(scale.to(tl.float64), weights - (CHUNK - 1) * weight)
        reached = tl.sum(tl.where(m >= middle, least, 0.0), 0) > target * 1.000001
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle)
    return low


@jit
def _load_tile(  # type: ignore[no-untyped-def]
    tile,
    least,
    source,
    B: tl.constexpr,
    E: tl.constexpr,
    EDITS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Edited logits (CHUNKS, CHUNK) of a tile's chunks whose maxima are not below `least`, elsewhere -inf; maxima."""
    x, chunk_maxima, num_chunks, row, position, edited, V, edits = source
    chunk = tile * CHUNKS + tl.arange(0, CHUNKS)
    m = tl.load(chunk_maxima + chunk, mask=chunk < num_chunks, other=float("-inf"))
    column = chunk[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    wanted = (column < V) & (m >= least)[:, None]
    z = tl.load(x + column, mask=wanted, other=float("-inf")).to(tl.float32)
    if EDITS:
        if edited:
            first = tile * CHUNKS * CHUNK
            end = first + CHUNKS * CHUNK
            z = edit(z, column, first, end, row, position, V, edits, B, E)
            z = tl.where(wanted, z, float("-inf"))
    return z, m


@jit
def _gather(  # type: ignore[no-untyped-def]
    pivot,
    high,
    listed,
    peak,
    factor,
    source,
    B: tl.constexpr,
    E: tl.constexpr,
    EDITS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    """Number and mass of the values whose places are in [pivot, high); the first CAPACITY of them go to `listed`."""
    least = _value(pivot)
    num = 0
    mass = tl.zeros((), tl.float64)
    tl.debug_barrier()  # all have read what an earlier pass listed
    for tile in range(tl.cdiv(source[2], CHUNKS)):
        z, m = _load_tile(tile, least, source, B, E, EDITS, CHUNK, CHUNKS)
        if tl.max(m, 0) >= least:
            place = _order(z)
            taken = (place >= pivot.to(tl.int32)) & (place < high.to(tl.int32))
            ones = taken.to(tl.int32)
            of_chunk = tl.sum(ones, 1)
            before = num + tl.cumsum(of_chunk, 0) - of_chunk
            at = before[:, None] + tl.cumsum(ones, 1) - 1
            tl.store(listed + at, z, mask=taken & (at < CAPACITY))
            w = tl.where(taken, tl.exp2((z - peak) * factor), 0.0)
            num += tl.sum(of_chunk, 0)
            mass += tl.sum(tl.sum(w.to(tl.float64), 1), 0)
    tl.debug_barrier()  # all is listed
    return num, mass


@jit
def _next_pivot(low, high, heat, step):  # type: ignore[no-untyped-def]
    """A place in (low, high): halfway between values at first, then between places, which always ends."""
    middle = 0.5 * (_value(low) + _value(high))
    # From a `low` that is only the least float32 there is, values are far away: go down from the other end.
    downwards = _value(high) - heat * tl.exp2(step.to(tl.float32))
    middle = _order(tl.where(_value(low) < -3e38, downwards, middle)).to(tl.int64)
    halved = (step < 12) & (middle > low) & (middle < high)
    return tl.where(halved, middle, (low + high) >> 1)


@jit
def _search(  # type: ignore[no-untyped-def]
    by_count,
    target,
    least,
    guess,
    listed,
    peak,
    heat,
    source,
    B: tl.constexpr,
    E: tl.constexpr,
    EDITS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    """The largest value from which up there are `target` values, or is the mass `target`; and, for a number, the mass
    of the `target` largest. It must be `least` at least; `guess` is where to look first."""
    factor = 1.4426950408889634 / heat
    # The bound's place in the order is in [low, high). `inside` is how many values are there at most, and above_num and
    # above_mass what lies from `high` up.
    low, high = _order(least).to(tl.int64), _order(peak).to(tl.int64) + 1
    pivot = _order(guess).to(tl.int64)
    inside = source[6]
    above_num = 0
    above_mass = tl.zeros((), tl.float64)
    step = 0
    searching = True
    while searching:
        num, mass = _gather(
            pivot, high, listed, peak, factor, source, B, E, EDITS, CHUNK, CHUNKS, CAPACITY
        )
        reach = tl.where(by_count, (above_num + num).to(tl.float64), above_mass + mass)
        reached = (pivot == low) | (reach >= target)
        low, high = tl.where(reached, pivot, low), tl.where(reached, high, pivot)
        inside = tl.where(reached, num, inside - num)
        above_num += tl.where(reached, 0, num)
        above_mass += tl.where(reached, 0.0, mass)
        fits = inside <= CAPACITY
        # What was listed last is what lies inside if the pivot was low enough; else the list must be made again.
        searching = tl.where(fits, reached == 0, high - low > 1)
        step += 1
        pivot = tl.where(fits, low, _next_pivot(low, high, heat, step))
    # Without a list all that lies inside is equal, and nothing is left to be found.
    num = tl.where(inside <= CAPACITY, inside, 0)
    index = tl.arange(0, CAPACITY)
    is_listed = index < num
    z = tl.load(listed + index, mask=is_listed, other=float("-inf"))
    place = _order(z)
    w = tl.where(is_listed, tl.exp2((z - peak) * factor), 0.0)
    measure = tl.where(by_count, is_listed.to(tl.float32), w).to(tl.float64)
    above = tl.where(by_count, above_num * tl.full((), 1.0, tl.float64), above_mass)
    while high - low > 1:
        middle = (low + high) >> 1
        reach = above + tl.sum(tl.where(place >= middle.to(tl.int32), measure, 0.0), 0)
        low, high = (
            tl.where(reach >= target, middle, low),
            tl.where(reach >= target, high, middle),
        )
    bound = _value(low)
    larger = place > low.to(tl.int32)
    num_larger = above_num + tl.sum((larger & is_listed).to(tl.int32), 0)
    mass = above_mass + tl.sum(tl.where(larger, w, 0.0).to(tl.float64), 0)
    mass += (target - num_larger) * tl.exp2((bound - peak) * factor).to(tl.float64)
    return bound, mass


@jit
def _bounds_kernel(  # type: ignore[no-untyped-def]
    logits,
    logit_rows,
    temperature,
    greedy,
    positions,
    stride,
    V,
    maxima,
    sums,
    plane,
    num_chunks,
    edits,
    top_k,
    top_p,
    min_p,
    bounds,
    candidates,
    B: tl.constexpr,
    E: tl.constexpr,
    EDITS: tl.constexpr,
    FILTERS: tl.constexpr,
    INDEXED: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    NUM: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    """One row, if it is filtered: its bound, and the chunks' sums of what is left."""
    row = tl.program_id(0)
    if is_filtered(row, V, tl.load(greedy + row) != 0, top_k, top_p, min_p):
        x_row = row.to(tl.int64)
        if INDEXED:
            x_row = tl.load(logit_rows + row).to(tl.int64)
        position = tl.load(positions + row)
        start = row.to(tl.int64) * num_chunks
        edited = False
        if EDITS:
            edited = is_edited(row, position, edits)
            if edited:
                start += plane
        heat = tl.load(temperature + row)
        factor = 1.4426950408889634 / heat
        x, chunk_maxima = logits + x_row * stride, maxima + start
        m, peak, scale, weights = row_totals(chunk_maxima, sums + start, num_chunks, factor, NUM)
        total = tl.sum(weights, 0)
        source = (x, chunk_maxima, num_chunks, row, position, edited, V, edits)
        listed = candidates + row.to(tl.int64) * CAPACITY
        k = tl.load(top_k + row)
        p = tl.load(top_p + row)
        bound = float("-inf")
        mass = total
        for phase in range(2):
            by_count = phase == 0
            asks = tl.where(by_count, (k > 0) & (k < V), p < 1)
            if asks & (total > 0):
                target = tl.where(by_count, k.to(tl.float64), p.to(tl.float64) * mass)
                least = tl.maximum(bound, -3.4028234663852886e38)
                guess = least
                if by_count:
                    if k <= num_chunks:
                        least = tl.maximum(least, _kth_of_chunks(m, k))
                        guess = least
                    else:  # nothing is known about how low it is
                        inside = tl.arange(0, NUM) < num_chunks
                        guess = tl.maximum(least, tl.min(tl.where(inside, m, peak), 0))
                else:
                    least = tl.maximum(
                        least,
                        _floor_of_mass(m, peak, scale, weights, total, target, factor, V, CHUNK),
                    )
                    guess = least
                bound, mass = _search(
                    by_count,
                    target,
                    least,
                    guess,
                    listed,
                    peak,
                    heat,
                    source,
                    B,
                    E,
                    EDITS,
                    CHUNK,
                    CHUNKS,
                    CAPACITY,
                )
        tl.store(bounds + row, bound)
        least_weight = tl.load(min_p + row)
        kept_sums = sums + 2 * plane + row.to(tl.int64) * num_chunks
        for tile in range(tl.cdiv(num_chunks, CHUNKS)):
            z, tops = _load_tile(tile, bound, source, B, E, EDITS, CHUNK, CHUNKS)
            base = tl.where(tops == float("-inf"), 0.0, tops)
            left = (z >= bound) & (tl.exp2((z - peak) * factor) >= least_weight)
            kept = tl.sum(tl.where(left, tl.exp2((z - base[:, None]) * factor), 0.0), 1)
            chunk = tile * CHUNKS + tl.arange(0, CHUNKS)
            tl.store(kept_sums + chunk, kept, mask=chunk < num_chunks)


def compute_bounds(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    greedy: torch.Tensor,
    positions: torch.Tensor,
    stats: LogitStats,
    bounds: torch.Tensor,
    candidates: torch.Tensor,
    filters: SamplingFilters,
    *,
    logit_rows: torch.Tensor | None = None,
    edits: LogitEdits | None = None,
) -> None:
    """For each of R rows that is filtered and not greedy (uint8): `bounds`, and the third plane of `stats.sums`.

    `stats` must hold the rows' chunks, computed with the same temperature (R) and edits. `candidates` is scratch,
    (R, any power of two) float32: how many values can be gathered.
    """
    num_rows, vocab_size = len(temperature), logits.shape[1]
    assert candidates.shape[0] >= num_rows and candidates.is_contiguous()
    kernel: Any = _bounds_kernel
    with launching_on(logits):
        kernel[(num_rows,)](
            logits,
            temperature if logit_rows is None else logit_rows,
            temperature,
            greedy,
            positions,
            logits.stride(0),
            vocab_size,
            **stats.arguments(),
            **logit_edits.arguments(edits),
            **arguments(filters, temperature),
            bounds=bounds,
            candidates=candidates,
            INDEXED=logit_rows is not None,
            CHUNKS=_CHUNKS,
            NUM=stats.padded_chunks,
            CAPACITY=candidates.shape[1],
            num_warps=_WARPS,
            enable_fp_fusion=False,  # edits are rounded step by step
        )


def reference(
    logits: torch.Tensor, temperature: torch.Tensor, filters: SamplingFilters
) -> torch.Tensor:
    """(R, V) bool, what is left of edited float32 logits, with a sort of every row."""
    z = logits.double() / temperature.double().unsqueeze(1)
    weights = (z - z.amax(-1, keepdim=True)).exp()
    left = torch.ones_like(z, dtype=torch.bool)
    for row, weight in enumerate(weights):
        k, p = int(filters.top_k[row]), float(filters.top_p[row])
        head = weight.sort(descending=True).values
        if 0 < k < len(head):
            head = head[:k]
        if p < 1:
            before = head.cumsum(0) - head
            head = head[: max(int((before < p * head.sum()).sum()), 1)]
        if 0 < k < len(weight) or p < 1:
            left[row] = weight >= head[-1]
        left[row] &= weight >= float(filters.min_p[row])
    return left
