"""Log-probabilities of given tokens, and of the most likely ones, from the chunks of `logit_stats`.

    logprob(v) = (x(v) - max x) / T - log(sum over all u of exp((x(u) - max x) / T))          of the raw logits x

After `sampling.sample` its `scratch.stats` hold what is needed, and nothing of the logits is read again but the tokens
asked for, and one chunk for each of the most likely. For prompts, `prompt_logprobs` sends hidden states through the
head in pieces of a reused buffer: at no time are there more rows of logits than the buffer has.

R rows, V vocabulary, M tokens per row, N most likely tokens, T prompt tokens, E hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .launching import jit, launching_on, next_power_of_two, tl
from .logit_stats import LogitStats, compute_stats, row_totals


@jit
def _token_kernel(  # type: ignore[no-untyped-def]
    logits,
    logit_rows,
    temperature,
    token_ids,
    logprobs,
    stride,
    num_tokens,
    maxima,
    sums,
    plane,
    num_chunks,
    INDEXED: tl.constexpr,
    CHUNK: tl.constexpr,
    NUM: tl.constexpr,
    MP: tl.constexpr,
):
    """The tokens of one row; M is padded to MP."""
    row = tl.program_id(0)
    source = row.to(tl.int64)
    if INDEXED:
        source = tl.load(logit_rows + row).to(tl.int64)
    heat = tl.load(temperature + row)
    start = row.to(tl.int64) * num_chunks
    factor = 1.4426950408889634 / heat
    _, peak, _, weights = row_totals(maxima + start, sums + start, num_chunks, factor, NUM)
    log_total = tl.log(tl.sum(weights, 0))
    index = tl.arange(0, MP)
    at = row.to(tl.int64) * num_tokens + index
    token = tl.load(token_ids + at, mask=index < num_tokens, other=-1).to(tl.int64)
    x = tl.load(logits + source * stride + token, mask=token >= 0, other=float("nan"))
    behind = tl.div_rn(x.to(tl.float32) - peak, heat).to(tl.float64)
    tl.store(logprobs + at, (behind - log_total).to(tl.float32), mask=index < num_tokens)


def gather_logprobs(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    token_ids: torch.Tensor,
    stats: LogitStats,
    out: torch.Tensor,
    *,
    logit_rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """Log-probabilities of token_ids (R) or (R, M), int32 or int64, into `out` of the same shape, float32.

    A negative id gives NaN. `stats` must hold the chunks of these logits at this temperature (R); row r is row r of the
    logits, or `logit_rows[r]`. All contiguous but the logits' rows. Returns `out`.
    """
    num_rows = len(temperature)
    assert token_ids.shape == out.shape and token_ids.shape[0] == num_rows
    assert token_ids.is_contiguous() and out.is_contiguous() and logits.stride(1) == 1
    num_tokens = token_ids[0].numel() if num_rows else 0
    if num_tokens == 0:
        return out
    kernel: Any = _token_kernel
    with launching_on(logits):
        kernel[(num_rows,)](
            logits,
            temperature if logit_rows is None else logit_rows,
            temperature,
            token_ids,
            out,
            logits.stride(0),
            num_tokens,
            **stats.arguments(),
            INDEXED=logit_rows is not None,
            NUM=stats.padded_chunks,
            MP=next_power_of_two(num_tokens),
            num_warps=2,
            enable_fp_fusion=False,  # as in sampling, whose log-probabilities are these
        )
    return out


@jit
def _top_kernel(  # type: ignore[no-untyped-def]
    logits,
    logit_rows,
    temperature,
    num_wanted,
    token_ids,
    logprobs,
    stride,
    V,
    N,
    maxima,
    sums,
    plane,
    num_chunks,
    INDEXED: tl.constexpr,
    CHUNK: tl.constexpr,
    NUM: tl.constexpr,
):
    """The most likely tokens of one row, one by one: the chunk with the largest that is left, and the column there."""
    row = tl.program_id(0)
    wanted = tl.minimum(tl.load(num_wanted + row), N)
    if wanted > 0:
        source = row.to(tl.int64)
        if INDEXED:
            source = tl.load(logit_rows + row).to(tl.int64)
        heat = tl.load(temperature + row)
        start = row.to(tl.int64) * num_chunks
        factor = 1.4426950408889634 / heat
        m, peak, _, weights = row_totals(maxima + start, sums + start, num_chunks, factor, NUM)
        log_total = tl.log(tl.sum(weights, 0))
        index = tl.arange(0, NUM)
        offset = tl.arange(0, CHUNK)
        # Of each chunk, what was taken from it last: what is left comes after, by value and then by column.
        taken = tl.full((NUM,), float("inf"), tl.float32)
        taken_offset = tl.full((NUM,), -1, tl.int32)
        for i in range(wanted):
            value = tl.max(m, 0)
            chunk = tl.min(tl.where(m == value, index, NUM - 1), 0)
            chunk = tl.minimum(chunk, num_chunks - 1)
            last = tl.sum(tl.where(index == chunk, taken, 0.0), 0)
            last_offset = tl.sum(tl.where(index == chunk, taken_offset, 0), 0)
            column = chunk * CHUNK + offset
            x = tl.load(logits + source * stride + column, mask=column < V, other=float("-inf"))
            z = x.to(tl.float32)
            left = (z < last) | ((z == last) & (offset > last_offset))
            found = tl.min(tl.where(left & (z == value), offset, CHUNK - 1), 0)
            rest = (z < value) | ((z == value) & (offset > found))
            m = tl.where(index == chunk, tl.max(tl.where(rest, z, float("-inf")), 0), m)
            taken = tl.where(index == chunk, value, taken)
            taken_offset = tl.where(index == chunk, found, taken_offset)
            at = row.to(tl.int64) * N + i
            behind = tl.div_rn(value - peak, heat).to(tl.float64)
            tl.store(token_ids + at, tl.minimum(chunk * CHUNK + found, V - 1).to(tl.int64))
            tl.store(logprobs + at, (behind - log_total).to(tl.float32))


def top_logprobs(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    num_wanted: torch.Tensor,
    stats: LogitStats,
    token_ids: torch.Tensor,
    logprobs: torch.Tensor,
    *,
    logit_rows: torch.Tensor | None = None,
) -> None:
    """The `num_wanted[r]` most likely tokens of row r, most likely first, equals by id, into the first columns of
    token_ids (R, N) int64 and logprobs (R, N) float32; a row that wants none costs nothing. num_wanted (R) int32.

    `stats` and `logit_rows` as in `gather_logprobs`. Where fewer logits than wanted are finite the rest is unspecified.
    """
    num_rows, width = token_ids.shape
    assert len(temperature) == len(num_wanted) == num_rows and logprobs.shape == token_ids.shape
    assert token_ids.is_contiguous() and logprobs.is_contiguous() and logits.stride(1) == 1
    kernel: Any = _top_kernel
    with launching_on(logits):
        kernel[(num_rows,)](
            logits,
            temperature if logit_rows is None else logit_rows,
            temperature,
            num_wanted,
            token_ids,
            logprobs,
            logits.stride(0),
            logits.shape[1],
            width,
            **stats.arguments(),
            INDEXED=logit_rows is not None,
            NUM=stats.padded_chunks,
            num_warps=4,
            enable_fp_fusion=False,  # as in sampling, whose log-probabilities are these
        )


def prompt_logprobs(
    hidden: torch.Tensor,
    project: Callable[[torch.Tensor, torch.Tensor], object],
    targets: torch.Tensor,
    buffer: torch.Tensor,
    stats: LogitStats,
    out: torch.Tensor,
) -> torch.Tensor:
    """Log-probabilities at temperature 1 of targets (T) or (T, M) after hidden states (T, E), into `out`, float32.

    `project(hidden[a:b], rows)` writes logits (b - a, V) into `rows`, the first ones of `buffer` (rows, V). `stats` has
    at least as many rows as the buffer. Returns `out`.
    """
    ones = torch.ones(buffer.shape[0], dtype=torch.float32, device=hidden.device)
    for first in range(0, hidden.shape[0], buffer.shape[0]):
        piece = slice(first, min(first + buffer.shape[0], hidden.shape[0]))
        num_rows = piece.stop - first
        logits, temperature = buffer[:num_rows], ones[:num_rows]
        project(hidden[piece], logits)
        compute_stats(logits, temperature, stats)
        gather_logprobs(logits, temperature, targets[piece], stats, out[piece])
    return out


def reference(
    logits: torch.Tensor, temperature: torch.Tensor, token_ids: torch.Tensor
) -> torch.Tensor:
    """The formula for token_ids (R, M) in torch operations, float32."""
    return torch.log_softmax(logits.float() / temperature.unsqueeze(1), -1).gather(1, token_ids)
