"""The log-probability rule, in its one place.

    logprob(token) = log_softmax(logits / temperature)[token]     in float32, over the whole vocabulary

of the raw logits: before penalties, biases, minimum lengths, top-k, top-p and min-p, which only steer what is drawn.
The temperature is `SamplingParams.logprob_temperature` for drawn tokens (1 for greedy ones) and 1 for prompt tokens.

Work goes by blocks of rows whose probabilities stay in the processor's cache: a pass over a fresh matrix of the size of
the logits costs more in page faults than the softmax itself. A row's values do not depend on the rows beside it.

Shapes: R rows, B rows of a block, V vocabulary, C chunks, M targets per row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .selection import chunk_sums, largest

BLOCK_BYTES = 8 << 20
"""Probabilities of one block."""
_SAFE_PROBABILITY = 1e-30
"""Below it a float32 probability may be denormal or 0, and its logarithm is taken another way."""

Temperature = float | Sequence[float] | Tensor


def chunk_size(vocab_size: int) -> int:
    """Columns per chunk of a two-level sum over a row: near the square root, so that both levels are short."""
    return 1 << max(6, min(9, round(vocab_size.bit_length() / 2)))


def rows_per_block(num_columns: int) -> int:
    """Rows whose float32 values fit the size of a block; at least one."""
    return max(BLOCK_BYTES // (4 * num_columns), 1)


class ProbabilityBlock:
    """Softmax of some neighbouring rows; valid until the next block is asked for."""

    def __init__(self, logits: Tensor, temperature: Tensor | None, values: Tensor, first: int):
        self.rows = slice(first, first + values.shape[0])
        """Which of the rows that were asked for."""
        self.values = values
        """(B, V) probabilities; they sum to `total`, which is 1 but for rounding."""
        self._logits = logits
        self._temperature = temperature
        self.sums = chunk_sums(values, chunk_size(values.shape[1]))
        """(B, C) sums of chunks of columns."""
        self.total = self.sums.sum(-1, dtype=torch.float64)
        """(B,) sums of the rows; not a number where a logit is not, or is plus infinity, or all are minus infinity."""

    def logprobs(self, targets: Tensor) -> Tensor:
        """(B, M) log-probabilities of token ids (B, M). To be asked before `values` is changed."""
        found = self.values.gather(1, targets)
        result = found.double().log_().sub_(self.total.log().unsqueeze(1)).float()
        tiny = found < _SAFE_PROBABILITY
        if tiny.any():
            result[tiny] = self._logprobs_from_the_maximum(targets)[tiny]
        return result

    def _logprobs_from_the_maximum(self, targets: Tensor) -> Tensor:
        logits = self._logits.float()
        behind = logits.gather(1, targets) - logits.amax(-1, keepdim=True)
        if self._temperature is not None:
            behind = behind / self._temperature
        top = self.values.amax(-1, keepdim=True).double().log() - self.total.log().unsqueeze(1)
        return (behind.double() + top).float()


def probability_blocks(
    logits: Tensor, temperature: Temperature, rows: Tensor | None = None
) -> Iterator[ProbabilityBlock]:
    """Blocks of `softmax(logits / temperature)`, in order, over all rows of (R, V) logits or those of `rows` (R',).

    `temperature` is one number or has one value per row that is asked for. The logits are not changed.
    """
    num_rows, num_columns = logits.shape if rows is None else (len(rows), logits.shape[1])
    if num_rows == 0:
        return
    divisors = _divisors(temperature, num_rows, logits.device)
    step = min(rows_per_block(num_columns), num_rows)
    buffer = torch.empty(step, num_columns, dtype=torch.float32, device=logits.device)
    scratch = torch.empty_like(buffer)
    for first in range(0, num_rows, step):
        end = min(first + step, num_rows)
        values = buffer[: end - first]
        part = logits[first:end] if rows is None else logits.index_select(0, rows[first:end])
        scaled, divisor = part, None
        if divisors is not None:
            divisor = divisors[first:end]
            scaled = torch.div(part, divisor, out=scratch[: end - first])
        elif part.dtype != torch.float32:
            scaled = scratch[: end - first].copy_(part)
        torch.softmax(scaled, -1, out=values)
        yield ProbabilityBlock(part, divisor, values, first)


def _divisors(temperature: Temperature, num_rows: int, device: torch.device) -> Tensor | None:
    """(R, 1) temperatures; None: all are 1."""
    if isinstance(temperature, (int, float)):
        if temperature == 1.0:
            return None
        return torch.full((num_rows, 1), float(temperature), device=device)
    divisors = torch.as_tensor(temperature, dtype=torch.float32, device=device).expand(num_rows)
    return None if bool((divisors == 1.0).all()) else divisors.unsqueeze(1)


def token_logprobs(logits: Tensor, temperature: Temperature, targets: Tensor) -> Tensor:
    """Log-probabilities of token ids: (R, V) logits, targets (R,) or (R, M) -> float32 of the shape of `targets`."""
    wanted = targets.to(logits.device)
    if targets.dim() == 1:
        wanted = wanted.unsqueeze(1)
    result = torch.empty(wanted.shape, dtype=torch.float32, device=logits.device)
    for block in probability_blocks(logits, temperature):
        result[block.rows] = block.logprobs(wanted[block.rows])
    return result.view(targets.shape)


def top_logprobs(logits: Tensor, temperature: Temperature, k: int) -> tuple[Tensor, Tensor]:
    """The k most likely tokens of each row, most likely first: (R, k) float32 log-probabilities and (R, k) token ids.

    There are fewer columns than k only if the vocabulary is smaller.
    """
    shape = (logits.shape[0], min(k, logits.shape[1]))
    values = torch.empty(shape, dtype=torch.float32, device=logits.device)
    ids = torch.empty(shape, dtype=torch.int64, device=logits.device)
    for block in probability_blocks(logits, temperature):
        # From the logits: different ones may have the same float32 probability.
        ids[block.rows] = largest(logits[block.rows], k)[1]
        values[block.rows] = block.logprobs(ids[block.rows])
    return values, ids
