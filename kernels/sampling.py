"""From logits to tokens and their log-probabilities on the device, without a look from the host.

For row r with raw logits x, edited logits z (`logit_edits`), temperature T, and the columns K that filters leave:

    token   = the first column v of K for which  sum over u <= v in K of w(u)  >  U(seed, position) * sum over K of w
              with w(u) = exp((z(u) - max z) / T);  greedy rows: the first column with the largest z
    logprob = (x(token) - max x) / T - log(sum over all u of exp((x(u) - max x) / T))
    U       = mix64(mix64(seed) + position) / 2^64, of which the highest 53 bits are taken

Logarithms are of the raw logits over the whole vocabulary, whatever edits and filters do to the draw. A draw depends
on the row's logits, its parameters, its seed and its position, and on nothing else: chunks of the vocabulary and the
order of all sums are fixed. Up to the rounding of sums it is the draw of the engine's CPU sampler.

Plain rows cost one read of the logits; edited rows two, and one of their count table; filtered rows one more.

How it is called, once a step, in a CUDA graph or not; nothing is allocated, nothing is read by the host:

    rows    = SamplingRows(seeds=, positions=, temperature=, greedy=[, logit_rows=])
    scratch = SamplingScratch.allocate(max_rows, vocab_size, device[, filters=True])        once
    out     = SampledTokens.allocate(max_rows, device)                                      once
    sample(logits, rows, scratch, out[, edits=LogitEdits(...)][, filters=SamplingFilters(...)])

`edits` and `filters` cost a launch or a branch each for rows that do not ask, so a graph may leave them out (None)
where no row of the batch asks.

R rows, V vocabulary, C chunks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from . import logit_edits, logit_filters, random_numbers
from .filter_bounds import is_filtered
from .launching import jit, launching_on, tl
from .logit_edits import LogitEdits, count_token, edit, is_edited
from .logit_filters import FilterScratch, SamplingFilters
from .logit_stats import LogitStats, compute_stats, row_totals
from .random_numbers import uniform

_WARPS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingRows:
    """What every row needs; contiguous tensors on one device, whose contents may change between replays of a graph."""

    seeds: torch.Tensor
    """(R) int64: the 64 bits of each request's seed."""
    positions: torch.Tensor
    """(R) int32 or int64: tokens of the request's output before this one."""
    temperature: torch.Tensor
    """(R) float32 > 0, 1 for rows whose temperature is 0: divides logits, for the draw and for the log-probability."""
    greedy: torch.Tensor
    """(R) bool: take the most likely token."""
    logit_rows: torch.Tensor | None = None
    """(R) int32: the row of the logits that each row samples from; None: its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledTokens:
    """What `sample` writes, into the first R rows."""

    token_ids: torch.Tensor
    """(R) int64; 0 in bad rows."""
    logprobs: torch.Tensor
    """(R) float32."""
    bad: torch.Tensor
    """(R) bool: the logits are no distribution: NaN, plus infinity, or nothing that may be drawn."""

    @classmethod
    def allocate(cls, num_rows: int, device: torch.device) -> SampledTokens:
        """Memory for up to `num_rows` rows."""
        return cls(
            token_ids=torch.zeros(num_rows, dtype=torch.int64, device=device),
            logprobs=torch.zeros(num_rows, dtype=torch.float32, device=device),
            bad=torch.zeros(num_rows, dtype=torch.bool, device=device),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingScratch:
    """Memory that `sample` works in; `stats` holds the raw logits' chunks afterwards, for `token_logprobs`."""

    stats: LogitStats
    """Chunks of all rows."""
    filters: FilterScratch | None
    """None: nothing will be filtered."""

    @classmethod
    def allocate(
        cls, num_rows: int, vocab_size: int, device: torch.device, *, filters: bool = True
    ) -> SamplingScratch:
        """Memory for up to `num_rows` rows: 20 bytes per chunk, and with `filters` 64 KiB per row."""
        return cls(
            stats=LogitStats.allocate(num_rows, vocab_size, device),
            filters=FilterScratch.allocate(num_rows, device) if filters else None,
        )


@jit
def _first_beyond(weights, target, index, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first index with a weight whose running sum exceeds `target`, or the last with a weight; the sum before."""
    running = tl.cumsum(weights, 0)
    found = tl.min(tl.where((running > target) & (weights > 0), index, SIZE), 0)
    last = tl.maximum(tl.max(tl.where(weights > 0, index, -1), 0), 0)
    found = tl.where(found == SIZE, last, found)
    return found, tl.sum(tl.where(index == found - 1, running, 0.0), 0)


@jit
def _draw_kernel(  # type: ignore[no-untyped-def]
    logits,
    logit_rows,
    seeds,
    positions,
    temperature,
    greedy,
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
    chosen,
    token_ids,
    logprobs,
    bad,
    B: tl.constexpr,
    E: tl.constexpr,
    EDITS: tl.constexpr,
    FILTERS: tl.constexpr,
    INDEXED: tl.constexpr,
    CHUNK: tl.constexpr,
    NUM: tl.constexpr,
):
    """One row: the chunk, the column in it, the log-probability."""
    row = tl.program_id(0)
    source = row.to(tl.int64)
    if INDEXED:
        source = tl.load(logit_rows + row).to(tl.int64)
    position = tl.load(positions + row)
    heat = tl.load(temperature + row)
    factor = 1.4426950408889634 / heat
    takes_largest = tl.load(greedy + row) != 0
    start = row.to(tl.int64) * num_chunks
    m, peak, scale, weights = row_totals(maxima + start, sums + start, num_chunks, factor, NUM)
    raw_peak = peak
    raw_total = tl.sum(weights, 0)
    edited = False
    if EDITS:
        edited = is_edited(row, position, edits)
        if edited:
            m, peak, scale, weights = row_totals(
                maxima + plane + start, sums + plane + start, num_chunks, factor, NUM
            )
    bound = float("-inf")
    least = 0.0
    already = -1
    if FILTERS:
        if is_filtered(row, V, takes_largest, top_k, top_p, min_p):
            already = tl.load(chosen + row)
            if already < 0:
                chunk_sum = sums + 2 * plane + start + tl.arange(0, NUM)
                kept = tl.load(chunk_sum, mask=tl.arange(0, NUM) < num_chunks, other=0.0)
                weights = tl.where(weights == weights, (kept * scale).to(tl.float64), weights)
                bound = tl.load(bounds + row)
                least = tl.load(min_p + row)
    total = tl.sum(weights, 0)
    target = uniform(tl.load(seeds + row), position) * total
    index = tl.arange(0, NUM)
    chunk, before = _first_beyond(weights, target, index, NUM)
    largest = tl.min(tl.where(m == peak, index, NUM - 1), 0)
    chunk = tl.minimum(tl.where(takes_largest, largest, chunk), num_chunks - 1)
    chunk_peak = tl.sum(tl.where(index == chunk, m, 0.0), 0)
    chunk_scale = tl.sum(tl.where(index == chunk, scale, 0.0), 0)

    offset = tl.arange(0, CHUNK)
    column = chunk * CHUNK + offset
    x = logits + source * stride
    z = tl.load(x + column, mask=column < V, other=float("-inf")).to(tl.float32)
    if EDITS:
        if edited:
            z = edit(
                z,
                column,
                chunk * CHUNK,
                chunk * CHUNK + CHUNK,
                row,
                position,
                V,
                edits,
                B,
                E,
            )
    weight = tl.where(z >= bound, tl.exp2((z - chunk_peak) * factor), 0.0)
    if FILTERS:
        weight = tl.where(tl.exp2((z - peak) * factor) >= least, weight, 0.0)
    inner = (target - before) / chunk_scale.to(tl.float64)
    found, _ = _first_beyond(weight.to(tl.float64), inner, offset, CHUNK)
    first = tl.min(tl.where(z == chunk_peak, offset, CHUNK - 1), 0)
    token = tl.minimum(chunk * CHUNK + tl.where(takes_largest, first, found), V - 1)
    if FILTERS:
        token = tl.where(already >= 0, already, token)

    # Neither comparison holds for NaN; an infinite peak makes its chunk's sum NaN.
    good = (total > 0) & (raw_total > 0)
    token = tl.where(good, token, 0)
    behind = tl.div_rn(tl.load(x + token).to(tl.float32) - raw_peak, heat)
    logprob = (behind.to(tl.float64) - tl.log(raw_total)).to(tl.float32)
    tl.store(token_ids + row, token.to(tl.int64))
    tl.store(logprobs + row, tl.where(good, logprob, float("nan")))
    tl.store(bad + row, (good == 0).to(tl.uint8))
    if EDITS:
        if good:
            count_token(token, row, V, edits)


def sample(
    logits: torch.Tensor,
    rows: SamplingRows,
    scratch: SamplingScratch,
    out: SampledTokens,
    *,
    edits: LogitEdits | None = None,
    filters: SamplingFilters | None = None,
) -> None:
    """Draw one token for each of R `rows` from logits (rows, V), bfloat16, float16 or float32, which are not changed.

    Columns must be contiguous, rows may be strided. Only the first R rows of `scratch` and `out` are written. The drawn
    token is counted in the row's table of `edits`.
    """
    stats, num_rows, vocab_size = scratch.stats, len(rows.temperature), logits.shape[1]
    compute_stats(
        logits,
        rows.temperature,
        stats,
        logit_rows=rows.logit_rows,
        edits=edits,
        positions=rows.positions,
    )
    greedy = rows.greedy.view(torch.uint8)
    if filters is not None:
        assert scratch.filters is not None
        logit_filters.apply_filters(
            logits,
            rows.seeds,
            rows.positions,
            rows.temperature,
            greedy,
            stats,
            filters,
            scratch.filters,
            logit_rows=rows.logit_rows,
            edits=edits,
        )
    kernel: Any = _draw_kernel
    with launching_on(logits):
        kernel[(num_rows,)](
            logits,
            rows.seeds if rows.logit_rows is None else rows.logit_rows,
            rows.seeds,
            rows.positions,
            rows.temperature,
            greedy,
            logits.stride(0),
            vocab_size,
            **stats.arguments(),
            **logit_edits.arguments(edits),
            **logit_filters.arguments(filters, rows.temperature),
            bounds=rows.temperature if scratch.filters is None else scratch.filters.bounds,
            chosen=rows.seeds if scratch.filters is None else scratch.filters.chosen,
            token_ids=out.token_ids,
            logprobs=out.logprobs,
            bad=out.bad.view(torch.uint8),
            INDEXED=rows.logit_rows is not None,
            NUM=stats.padded_chunks,
            num_warps=_WARPS,
            enable_fp_fusion=False,  # edits are rounded step by step
        )


def reference(
    logits: torch.Tensor,
    rows: SamplingRows,
    *,
    edits: LogitEdits | None = None,
    filters: SamplingFilters | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (R) int64 and log-probabilities (R) float64 of the formulas, in torch operations; counts nothing."""
    raw = logits.float() if rows.logit_rows is None else logits[rows.logit_rows.long()].float()
    z = raw if edits is None else logit_edits.reference(raw, edits, rows.positions)
    temperature = rows.temperature.double().unsqueeze(1)
    scaled = z.double() / temperature
    weights = (scaled - scaled.amax(-1, keepdim=True)).exp()
    if filters is not None:
        weights = weights.masked_fill(~logit_filters.reference(z, rows.temperature, filters), 0.0)
    running = weights.cumsum(-1)
    pairs = zip(rows.seeds.tolist(), rows.positions.tolist(), strict=True)
    numbers = [[random_numbers.reference(seed, position)] for seed, position in pairs]
    target = torch.tensor(numbers, dtype=torch.float64, device=logits.device) * running[:, -1:]
    drawn = torch.searchsorted(running, target, right=True).squeeze(1)
    tokens = torch.where(rows.greedy, z.argmax(-1), drawn)
    logprobs = torch.log_softmax(raw.double() / temperature, -1)
    return tokens, logprobs.gather(1, tokens.unsqueeze(1)).squeeze(1)
