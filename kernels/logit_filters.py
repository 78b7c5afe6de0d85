"""top-k, top-p and min-p without a sort: for each row the least logit that may be drawn, and what that leaves.

With w(v) = exp((z(v) - max z) / T) of the edited logits z, v is left where

    z(v) >= b_k      b_k the k-th largest z                                                          (k > 0)
    z(v) >= b_p      b_p the largest z whose  sum over z(u) >= b_p of w(u)  reaches  p * the mass of the k largest,
                     or of all where there is no k                                                   (p < 1)
    w(v) >= min_p                                                                                    (min_p > 0)

so tokens that are exactly as likely as the last one that is left are left too.

The chunks' maxima and sums alone give a value that no bound can be below (`_least_kernel`). What lies from there up,
mostly a few hundred values, is gathered by programs all over the vocabulary (`_gather_kernel`), and one program per row
finds the bounds among them and draws (`filter_bounds`). A row of which too much may matter is read again.

R rows, V vocabulary, C chunks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from . import logit_edits
from .filter_bounds import bounds_kernel, is_filtered, order, value
from .launching import jit, launching_on, tl
from .logit_edits import LogitEdits, edit, is_edited
from .logit_stats import LogitStats, row_totals, tiles_per_program

CAPACITY = 8192
"""Values that are gathered at most."""
_SMALL = 1024
"""Lists of up to so many values are searched with fewer registers."""
_TILE_CHUNKS = 4
"""Chunks that are read at once."""
_UNITS = float(1 << 44)
"""Weights are added in this part of the largest."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class FilterScratch:
    """Memory to filter R rows in; contiguous tensors."""

    least: torch.Tensor
    """(R) float32: values from here up are gathered."""
    num_listed: torch.Tensor
    """(R) int32: how many there are; no more than fit are listed."""
    values: torch.Tensor
    """(R, a power of two) float32."""
    columns: torch.Tensor
    """(R, as above) int32."""
    bounds: torch.Tensor
    """(R) float32: the least value that top-k and top-p leave."""
    chosen: torch.Tensor
    """(R) int32: the token that was drawn from the list; -1: none yet."""

    @classmethod
    def allocate(
        cls, num_rows: int, device: torch.device, capacity: int = CAPACITY
    ) -> FilterScratch:
        """Memory for up to `num_rows` rows, 64 KiB each."""

        def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        return cls(
            least=empty(num_rows, dtype=torch.float32),
            num_listed=empty(num_rows),
            values=empty(num_rows, capacity, dtype=torch.float32),
            columns=empty(num_rows, capacity),
            bounds=empty(num_rows, dtype=torch.float32),
            chosen=empty(num_rows),
        )


@jit
def _kth_of_chunks(m, k):  # type: ignore[no-untyped-def]
    """The k-th largest of the chunks' maxima, which the k-th largest of the row cannot be below."""
    places = order(m)
    low = tl.min(places, 0).to(tl.int64)
    high = tl.max(places, 0).to(tl.int64) + 1
    while high - low > 1:
        middle = (low + high) >> 1
        reached = tl.sum((places >= middle.to(tl.int32)).to(tl.int32), 0) >= k
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle)
    return value(low)


@jit
def _floor_of_mass(m, peak, scale, weights, p, factor, V, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    """A value that the bound of the mass p cannot be below.

    If every column had at most the weight (1 - p) / V of all, together they would be what may be missing. Better: from
    z up lies, in each chunk whose maximum is not below z, at least that maximum, and at least the chunk's sum less
    CHUNK - 1 weights of z.
    """
    total = tl.sum(weights, 0)
    target = p.to(tl.float64) * total
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
def _least_kernel(  # type: ignore[no-untyped-def]
    temperature,
    greedy,
    positions,
    V,
    maxima,
    sums,
    plane,
    num_chunks,
    edits,
    top_k,
    top_p,
    min_p,
    least,
    num_listed,
    B: tl.constexpr,
    E: tl.constexpr,
    EDITS: tl.constexpr,
    FILTERS: tl.constexpr,
    CHUNK: tl.constexpr,
    NUM: tl.constexpr,
):
    """Of one row, from where up values are gathered: all that can be left, or the sums in question cannot do without;
    infinity where nothing is filtered."""
    row = tl.program_id(0)
    floor = float("inf")
    if is_filtered(row, V, tl.load(greedy + row) != 0, top_k, top_p, min_p):
        start = row.to(tl.int64) * num_chunks
        if EDITS:
            if is_edited(row, tl.load(positions + row), edits):
                start += plane
        factor = 1.4426950408889634 / tl.load(temperature + row)
        m, peak, scale, weights = row_totals(maxima + start, sums + start, num_chunks, factor, NUM)
        k = tl.load(top_k + row)
        p = tl.load(top_p + row)
        least_weight = tl.load(min_p + row)
        floor = -3.4028234663852886e38
        limited = (k > 0) & (k < V)
        if limited:
            if k <= num_chunks:
                floor = tl.maximum(floor, _kth_of_chunks(m, k))
            else:  # probably enough
                inside = tl.arange(0, NUM) < num_chunks
                floor = tl.maximum(floor, tl.min(tl.where(inside, m, peak), 0))
        else:
            if p < 1:
                floor = _floor_of_mass(m, peak, scale, weights, p, factor, V, CHUNK)
        # What min_p leaves out does not matter, unless it belongs to the mass of the k largest.
        if (least_weight > 0) & ((limited & (p < 1)) == 0):
            cut = peak + (tl.log2(least_weight) - 0.001) / factor - tl.abs(peak) * 1e-6
            floor = tl.maximum(floor, cut)
        # A row that is no distribution lists nothing.
        floor = tl.where(tl.sum(weights, 0) > 0, floor, float("inf"))
    tl.store(least + row, floor)
    tl.store(num_listed + row, 0)


@jit
def _gather_kernel(  # type: ignore[no-untyped-def]
    logits,
    logit_rows,
    positions,
    stride,
    V,
    tiles,
    maxima,
    sums,
    plane,
    num_chunks,
    edits,
    least,
    num_listed,
    values,
    columns,
    B: tl.constexpr,
    E: tl.constexpr,
    EDITS: tl.constexpr,
    INDEXED: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    """List the values of `tiles` times CHUNKS chunks of one row that are not below its `least`, in any order."""
    row = tl.program_id(1)
    floor = tl.load(least + row)
    if floor < float("inf"):
        start = row.to(tl.int64) * num_chunks
        edited = False
        position = tl.load(positions + row)
        if EDITS:
            edited = is_edited(row, position, edits)
            if edited:
                start += plane
        source = row.to(tl.int64)
        if INDEXED:
            source = tl.load(logit_rows + row).to(tl.int64)
        for i in range(tiles):
            tile = tl.program_id(0) * tiles + i
            chunk = tile * CHUNKS + tl.arange(0, CHUNKS)
            m = tl.load(maxima + start + chunk, mask=chunk < num_chunks, other=float("-inf"))
            if tl.max(m, 0) >= floor:
                first = tile * CHUNKS * CHUNK
                column = first + tl.arange(0, CHUNKS * CHUNK)
                at = logits + source * stride + column
                z = tl.load(at, mask=column < V, other=float("-inf")).to(tl.float32)
                if EDITS:
                    if edited:
                        end = first + CHUNKS * CHUNK
                        z = edit(z, column, first, end, row, position, V, edits, B, E)
                taken = z >= floor
                ones = taken.to(tl.int32)
                base = tl.atomic_add(num_listed + row, tl.sum(ones, 0), sem="relaxed")
                to = base + tl.cumsum(ones, 0) - 1
                taken = taken & (to < CAPACITY)
                to = row.to(tl.int64) * CAPACITY + to
                tl.store(values + to, z, mask=taken)
                tl.store(columns + to, column, mask=taken)


def apply_filters(
    logits: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    temperature: torch.Tensor,
    greedy: torch.Tensor,
    stats: LogitStats,
    filters: SamplingFilters,
    scratch: FilterScratch,
    *,
    logit_rows: torch.Tensor | None = None,
    edits: LogitEdits | None = None,
) -> None:
    """For each of R rows that is filtered and not greedy (uint8): `scratch.chosen`; or, where that is -1, `bounds` and
    the third plane of `stats.sums`.

    `stats` must hold the rows' chunks, computed with the same temperature (R) and edits.
    """
    num_rows, vocab_size = len(temperature), logits.shape[1]
    capacity = scratch.values.shape[1]
    assert scratch.values.shape[0] >= num_rows and scratch.columns.shape == scratch.values.shape
    common = {**stats.arguments(), **logit_edits.arguments(edits)}
    indexed = {
        "logit_rows": temperature if logit_rows is None else logit_rows,
        "INDEXED": logit_rows is not None,
        "stride": logits.stride(0),
        "V": vocab_size,
    }
    rows = {"temperature": temperature, "greedy": greedy, "positions": positions}
    lists = {"least": scratch.least, "num_listed": scratch.num_listed}
    launch = {"enable_fp_fusion": False}  # edits are rounded step by step
    num_tiles = -(-stats.maxima.shape[2] // _TILE_CHUNKS)
    tiles = tiles_per_program(num_rows, num_tiles)
    least, gather, bounds = _least_kernel, _gather_kernel, bounds_kernel
    with launching_on(logits):
        least[(num_rows,)](
            V=vocab_size,
            **rows,
            **common,
            **arguments(filters, temperature),
            **lists,
            NUM=stats.padded_chunks,
            num_warps=1,
            **launch,
        )
        gather[(-(-num_tiles // tiles), num_rows)](
            logits=logits,
            positions=positions,
            **indexed,
            **common,
            **lists,
            values=scratch.values,
            columns=scratch.columns,
            tiles=tiles,
            CHUNKS=_TILE_CHUNKS,
            CAPACITY=capacity,
            num_warps=4,
            **launch,
        )
        bounds[(num_rows,)](
            logits=logits,
            seeds=seeds,
            **rows,
            **indexed,
            **common,
            **arguments(filters, temperature),
            **lists,
            values=scratch.values,
            columns=scratch.columns,
            bounds=scratch.bounds,
            chosen=scratch.chosen,
            CHUNKS=2 * _TILE_CHUNKS,
            NUM=stats.padded_chunks,
            SMALL=min(_SMALL, capacity),
            CAPACITY=capacity,
            UNITS=_UNITS,
            num_warps=8,
            maxnreg=128,  # two programs fit a multiprocessor
            **launch,
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
