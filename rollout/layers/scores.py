"""Log-probabilities of given tokens, and of the most likely ones, for some rows of logits: asked for now, read later.

The rule is that of `logprobs`. Here it is computed at once, in torch operations; `device_scores` does it on a GPU.

R rows, V vocabulary, M given tokens, N most likely tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .logprobs import token_logprobs, top_logprobs


@dataclass(frozen=True, slots=True)
class Asked:
    """What is wanted of one row."""

    tokens: Sequence[int] = ()
    """Token ids whose log-probabilities are wanted."""
    num_top: int = 0
    """How many of the most likely tokens are."""
    temperature: float = 1.0
    """Divides the logits."""


@dataclass(frozen=True, slots=True)
class Scored:
    """The answer for one row."""

    given: list[float]
    """Log-probabilities of the given tokens, in their order."""
    top: list[tuple[float, int]]
    """(log-probability, token id) of the most likely tokens, most likely first; fewer if the vocabulary has fewer."""


class PendingScores(Protocol):
    """Scores that the host may not have yet."""

    def result(self) -> list[Scored]:
        """Wait for them: one for each row that was asked about."""


@dataclass(frozen=True, slots=True)
class _Known:
    """Scores for which nobody has to wait."""

    scores: list[Scored]

    def result(self) -> list[Scored]:
        return self.scores


def score(
    logits: Tensor, asked: Sequence[Asked], rows: Sequence[int] | None = None
) -> PendingScores:
    """Compute asked[i] from row i of float32 logits (R, V), or from row rows[i]."""
    if rows is not None:
        logits = logits.index_select(0, torch.tensor(list(rows), device=logits.device))
    temperatures = [one.temperature for one in asked]
    temperature = 1.0 if set(temperatures) == {1.0} else torch.tensor(temperatures)
    given: list[list[float]] = [[]] * len(asked)
    width = max((len(one.tokens) for one in asked), default=0)
    if width:
        padded = [[*one.tokens, *[0] * (width - len(one.tokens))] for one in asked]
        given = token_logprobs(logits, temperature, torch.tensor(padded)).tolist()
    top: list[list[tuple[float, int]]] = [[]] * len(asked)
    most = max((one.num_top for one in asked), default=0)
    if most:
        values, ids = (part.tolist() for part in top_logprobs(logits, temperature, most))
        top = [list(zip(*pair, strict=True)) for pair in zip(values, ids, strict=True)]
    return _Known(
        [
            Scored(known[: len(one.tokens)], best[: one.num_top])
            for one, known, best in zip(asked, given, top, strict=True)
        ]
    )
