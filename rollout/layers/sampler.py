"""From logits to tokens: what is drawn for each row, and with which log-probability.

The rule of log-probabilities is in `logprobs`. A draw depends on the row's logits, the request's seed and the position
in its output, and on nothing else: not on the batch, its order, or the rank. A row pays for what it asks for: greedy
rows without log-probabilities take one maximum, plain rows one softmax, and only rows with filters or edited logits
more.

Shapes: R rows, V vocabulary, N rows of a group, B rows of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..errors import NonFiniteLogitsError
from ..scheduling.request import Request
from .draw import draw, uniforms
from .logit_edits import edit_logits, is_editable, is_edited
from .logprobs import (
    ProbabilityBlock,
    chunk_size,
    probability_blocks,
    rows_per_block,
    token_logprobs,
)
from .sampling_filters import lower_bounds
from .scores import Asked, PendingScores, score
from .selection import argmax, chunk_sums


def non_finite(rows: Sequence[int], requests: Sequence[Request]) -> NonFiniteLogitsError:
    """The error of rows whose logits are no distribution; the other rows can be sampled without them."""
    names = ", ".join(f"{row} ({requests[row].rid})" for row in rows[:8])
    more = f" and {len(rows) - 8} more" if len(rows) > 8 else ""
    error = NonFiniteLogitsError(
        f"logits of rows {names}{more}: got NaN, infinity, or nothing that may be drawn, "
        "expected finite numbers; check the weights of this version"
    )
    error.rows = tuple(rows)
    return error


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleOutput:
    """One drawn token per row."""

    token_ids: list[int]
    """In row order."""
    logprobs: Tensor | None
    """(R,) float32 on the CPU, NaN in rows that did not ask and were not free; None: no row asked."""
    bad: tuple[int, ...] = ()
    """Rows whose logits are no distribution; their token is any."""


class PendingSample(Protocol):
    """Tokens that are drawn, but that the host may not have yet."""

    def result(self) -> SampleOutput:
        """Wait for them; at most once. Bad rows are in `bad`."""


class TokenSampler(Protocol):
    """Draws tokens without waiting for them."""

    tokens: Tensor
    """(R) integers on the model's device: what the last `launch` drew, until the next one's are written."""

    def launch(
        self, logits: Tensor, requests: Sequence[Request], rows: Sequence[int] | None = None
    ) -> PendingSample:
        """As `Sampler.sample`, but bad rows are listed in the result instead of raised."""

    def score(
        self, logits: Tensor, asked: Sequence[Asked], rows: Sequence[int] | None = None
    ) -> PendingScores:
        """Start to compute log-probabilities: asked[i] of row i of `logits`, or of row rows[i]."""


_KEPT_BATCHES = 16
"""Batches whose parameters are kept as arrays: a step may be sampled in several pieces."""


@dataclass(frozen=True, slots=True)
class _Drawn:
    """A `PendingSample` for which nobody has to wait."""

    output: SampleOutput

    def result(self) -> SampleOutput:
        return self.output


class Sampler:
    """Draws tokens. Keeps nothing but what recent batches asked for as arrays, which the next step mostly reuses."""

    def __init__(self) -> None:
        self._kept: dict[Request, tuple[list[Request], _Asked]] = {}
        self.tokens = torch.zeros(0, dtype=torch.int64)
        """(R) int64: what was drawn last."""

    def sample(
        self, logits: Tensor, requests: Sequence[Request], rows: Sequence[int] | None = None
    ) -> SampleOutput:
        """Draw one token for each of `requests` from float32 logits, which are not changed.

        Row i of `logits` is that of `requests[i]`, or `rows[i]` is (samples of one prompt share a row). The outputs of
        the requests hold the tokens drawn before this one. Raises `NonFiniteLogitsError`, whose `rows` are positions
        in `requests`.
        """
        output = self.launch(logits, requests, rows).result()
        if output.bad:
            raise non_finite(output.bad, requests)
        return output

    def launch(
        self, logits: Tensor, requests: Sequence[Request], rows: Sequence[int] | None = None
    ) -> PendingSample:
        """As `sample`, but bad rows are listed in the result instead of raised."""
        if rows is not None:
            logits = logits.index_select(0, torch.tensor(list(rows), device=logits.device))
        assert 0 < logits.shape[0] == len(requests)
        asked = self._what_is_asked(requests, logits.device)
        step = _Step(asked, _uniforms(requests, asked))
        edited = [row for row in asked.editable if is_edited(requests[row])]
        if edited:
            _sample_edited(step, logits, requests, edited)
        else:
            step.run(logits, asked.all_rows, None, asked.wants_logprob)
        self.tokens = step.tokens
        return _Drawn(
            SampleOutput(
                token_ids=step.tokens.tolist(),
                logprobs=step.logprobs.cpu() if asked.any_logprob else None,
                bad=tuple(step.bad.nonzero().squeeze(1).tolist()),
            )
        )

    def score(
        self, logits: Tensor, asked: Sequence[Asked], rows: Sequence[int] | None = None
    ) -> PendingScores:
        """Compute log-probabilities from float32 logits: asked[i] of row i, or of row rows[i]."""
        return score(logits, asked, rows)

    def _what_is_asked(self, requests: Sequence[Request], device: torch.device) -> _Asked:
        requests = list(requests)
        known, asked = self._kept.get(requests[0], (None, None))
        if asked is None or known != requests or asked.device != device:
            if len(self._kept) >= _KEPT_BATCHES:
                self._kept.clear()
            asked = _Asked(requests, device)
            self._kept[requests[0]] = (requests, asked)
        return asked


def _uniforms(requests: Sequence[Request], asked: _Asked) -> Tensor:
    lengths = np.fromiter((len(r.token_ids) for r in requests), np.int64, len(requests))
    numbers = uniforms(asked.seeds, lengths - asked.num_prompt_tokens)
    return torch.from_numpy(numbers).to(asked.device)


def _sample_edited(
    step: _Step, logits: Tensor, requests: Sequence[Request], edited: list[int]
) -> None:
    """Edited rows draw from a changed copy of their logits; their log-probabilities are those of the raw ones."""
    rows = torch.tensor(edited, device=logits.device)
    wants = step.asked.wants_logprob
    plain = torch.ones_like(wants)
    plain[rows] = False
    others = plain.nonzero().squeeze(1)
    step.run(logits, others, others, wants[others])
    size = rows_per_block(logits.shape[1])
    for first in range(0, len(edited), size):
        part = rows[first : first + size]
        raw = logits.index_select(0, part)
        changed = raw.clone()
        edit_logits(changed, [requests[row] for row in edited[first : first + size]])
        step.run(changed, part, None, torch.zeros_like(wants[part]))
        if wants[part].any():
            temperature = step.asked.temperature[part]
            step.logprobs[part] = token_logprobs(raw, temperature, step.tokens[part])


class _Asked:
    """What a batch of requests asks for, as arrays over its rows."""

    def __init__(self, requests: Sequence[Request], device: torch.device) -> None:
        everything = [request.params for request in requests]
        self.device = device
        self.all_rows = torch.arange(len(requests), device=device)
        self.seeds = np.array([request.seed for request in requests], np.uint64)
        self.num_prompt_tokens = np.array([r.num_prompt_tokens for r in requests], np.int64)
        self.temperature = torch.tensor([p.logprob_temperature for p in everything], device=device)
        self.greedy = torch.tensor([p.is_greedy for p in everything], device=device)
        self.wants_logprob = torch.tensor([r.return_logprob for r in requests], device=device)
        self.any_logprob = bool(self.wants_logprob.any())
        top_k = [p.top_k if p.top_k > 0 else 1 << 40 for p in everything]
        self.top_k = torch.tensor(top_k, device=device)
        self.top_p = torch.tensor([p.top_p for p in everything], dtype=torch.float64, device=device)
        self.min_p = torch.tensor([p.min_p for p in everything], device=device)
        filtered = [p.top_k > 0 or p.top_p < 1.0 or p.min_p > 0.0 for p in everything]
        self.filtered = torch.tensor(filtered, device=device) & ~self.greedy
        self.any_filtered = bool(self.filtered.any())
        self.editable = [row for row, params in enumerate(everything) if is_editable(params)]
        """Rows whose logits may have to be changed before a draw."""


class _Step:
    """Results of one call of `sample`, filled group by group; `rows` are always positions in the call's requests."""

    def __init__(self, asked: _Asked, uniform: Tensor) -> None:
        self.asked = asked
        self._uniform = uniform
        self.tokens = torch.zeros(len(uniform), dtype=torch.int64, device=asked.device)
        self.logprobs = torch.full((len(uniform),), float("nan"), device=asked.device)
        self.bad = torch.zeros(len(uniform), dtype=torch.bool, device=asked.device)

    def run(self, logits: Tensor, rows: Tensor, at: Tensor | None, wants_logprob: Tensor) -> None:
        """Draw for (N,) `rows`, whose logits are rows `at` of `logits`, or all of them in order."""
        greedy = self.asked.greedy[rows]
        if greedy.any():
            where = _some(greedy)
            picked = _at(at, where)
            self._take_most_likely(logits if picked is None else logits[picked], _of(rows, where))
        where = _some(~greedy | wants_logprob)
        rows, at = _of(rows, where), _at(at, where)
        want_logprobs = bool(wants_logprob.any())
        for block in probability_blocks(logits, self.asked.temperature[rows], at):
            self._draw_block(block, rows[block.rows], want_logprobs)

    def _take_most_likely(self, logits: Tensor, rows: Tensor) -> None:
        tokens = argmax(logits)
        self.tokens[rows] = tokens
        self.bad[rows] |= ~logits.gather(1, tokens.unsqueeze(1)).squeeze(1).isfinite()

    def _draw_block(self, block: ProbabilityBlock, rows: Tensor, want_logprobs: bool) -> None:
        asked = self.asked
        greedy = asked.greedy[rows]
        tokens = self.tokens[rows]
        if not greedy.all():
            drawn = draw(block.values, block.sums, self._uniform[rows])
            tokens = torch.where(greedy, tokens, drawn)
            if asked.any_filtered:
                where = _some(asked.filtered[rows])
                drawn = self._draw_filtered(_of(block.values, where), _of(rows, where))
                tokens = drawn if where is None else tokens.index_copy_(0, where, drawn)
            self.tokens[rows] = tokens
        if want_logprobs:
            self.logprobs[rows] = block.logprobs(tokens.unsqueeze(1)).squeeze(1)
        self.bad[rows] |= ~block.total.isfinite()

    def _draw_filtered(self, values: Tensor, rows: Tensor) -> Tensor:
        asked = self.asked
        bounds = lower_bounds(values, asked.top_k[rows], asked.top_p[rows], asked.min_p[rows])
        values = values.masked_fill(values < bounds.unsqueeze(1), 0.0)
        sums = chunk_sums(values, chunk_size(values.shape[1]))
        return draw(values, sums, self._uniform[rows])


def _some(mask: Tensor) -> Tensor | None:
    """Where `mask` holds; None: everywhere, so that nothing need be copied."""
    return None if mask.all() else mask.nonzero().squeeze(1)


def _of(values: Tensor, where: Tensor | None) -> Tensor:
    return values if where is None else values.index_select(0, where)


def _at(at: Tensor | None, where: Tensor | None) -> Tensor | None:
    return where if at is None else _of(at, where)
