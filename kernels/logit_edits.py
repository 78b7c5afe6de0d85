"""Penalties, biases and minimum lengths, applied to logits as kernels read them: no edited copy is ever stored.

For token v of a row, with n its count in the output, and `seen` where it occurs in prompt or output:

    z = z / repetition if z > 0 else z * repetition                where seen
    z = z - (frequency * n + presence * [n > 0])
    z = z + bias[v]                                                where the row has one
    z = -inf                                                       where v ends the request and it is too short yet

Each step is rounded to float32, in this order. Counts are a table of V int16 per row that has penalties, and only for
those: tables are a pool, and a row names its own. The sampling kernel counts the token that it draws.

R rows, V vocabulary, N tables, B biases, E ends of a row at most.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .launching import jit, tl

IN_PROMPT = -(1 << 15)
"""Bit of a count that says that the token occurs in the prompt."""
MAX_COUNT = (1 << 15) - 1
"""Counts stop here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitEdits:
    """What changes the logits of R rows before a draw; contiguous tensors on one device."""

    counts: torch.Tensor
    """(N, V) int16, from `count_table`."""
    tables: torch.Tensor
    """(R) int32: the row's table in `counts`; -1: no penalties."""
    repetition: torch.Tensor
    """(R) float32, 1: none."""
    frequency: torch.Tensor
    """(R) float32, 0: none."""
    presence: torch.Tensor
    """(R) float32, 0: none."""
    bias_ids: torch.Tensor
    """(R, B) int32, of which the first `num_biases` count; the ids of a row differ."""
    biases: torch.Tensor
    """(R, B) float32."""
    num_biases: torch.Tensor
    """(R) int32."""
    end_ids: torch.Tensor
    """(R, E) int32, of which the first `num_ends` count: tokens that end the request."""
    num_ends: torch.Tensor
    """(R) int32."""
    min_tokens: torch.Tensor
    """(R) int32: tokens that end the request have probability 0 while its position is below; 0: never."""

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """As the kernels take them."""
        return (
            self.counts,
            self.tables,
            self.repetition,
            self.frequency,
            self.presence,
            self.bias_ids,
            self.biases,
            self.num_biases,
            self.end_ids,
            self.num_ends,
            self.min_tokens,
        )


def arguments(edits: LogitEdits | None) -> dict[str, Any]:
    """What a kernel takes for `edits`."""
    if edits is None:
        return {"edits": None, "B": 0, "E": 0, "EDITS": False}
    widths = {"B": edits.bias_ids.shape[1], "E": edits.end_ids.shape[1]}
    return {"edits": edits.tensors(), **widths, "EDITS": True}


@jit
def is_edited(row, position, edits):  # type: ignore[no-untyped-def]
    """Something changes this row's logits."""
    _, tables, _, _, _, _, _, num_biases, _, num_ends, min_tokens = edits
    too_short = (tl.load(num_ends + row) > 0) & (position < tl.load(min_tokens + row))
    return (tl.load(tables + row) >= 0) | (tl.load(num_biases + row) > 0) | too_short


@jit
def edit(  # type: ignore[no-untyped-def]
    z, column, first, end, row, position, V, edits, B: tl.constexpr, E: tl.constexpr
):
    """Float32 logits z of the columns `column`, which lie in [first, end), of row `row` -> edited."""
    (
        counts,
        tables,
        repetition,
        frequency,
        presence,
        bias_ids,
        biases,
        num_biases,
        end_ids,
        num_ends,
        min_tokens,
    ) = edits
    table = tl.load(tables + row).to(tl.int64)
    if table >= 0:
        count = tl.load(counts + table * V + column, mask=column < V, other=0).to(tl.int32)
        factor = tl.load(repetition + row)
        z = tl.where(count != 0, tl.where(z > 0, tl.div_rn(z, factor), z * factor), z)
        num = (count & 0x7FFF).to(tl.float32)
        z -= tl.load(frequency + row) * num + tl.where(num > 0, tl.load(presence + row), 0.0)
    num_ids = tl.load(num_biases + row)
    for block in range(tl.cdiv(num_ids, 64)):
        index = block * 64 + tl.arange(0, 64)
        tokens = tl.load(bias_ids + row * B + index, mask=index < num_ids, other=-1)
        here = tl.where((tokens >= first) & (tokens < end), index, 0x7FFFFFFF)
        i = tl.min(here, 0)
        while i < 0x7FFFFFFF:  # one after another those in these columns, mostly few
            token = tl.load(bias_ids + row * B + i)
            z = tl.where(column == token, z + tl.load(biases + row * B + i), z)
            here = tl.where(here == i, 0x7FFFFFFF, here)
            i = tl.min(here, 0)
    if position < tl.load(min_tokens + row):
        for i in range(tl.load(num_ends + row)):
            token = tl.load(end_ids + row * E + i)
            if (token >= first) & (token < end):
                z = tl.where(column == token, float("-inf"), z)
    return z


@jit
def count_token(token, row, V, edits):  # type: ignore[no-untyped-def]
    """Count one more occurrence of a token in the row's table, where it has one."""
    counts, tables, _, _, _, _, _, _, _, _, _ = edits
    table = tl.load(tables + row).to(tl.int64)
    if table >= 0:
        at = counts + table * V + token
        count = tl.load(at).to(tl.int32)
        more = ((count & 0x7FFF) < 0x7FFF).to(tl.int32)
        tl.store(at, (count + more).to(tl.int16))


def count_table(
    table: torch.Tensor, prompt_ids: torch.Tensor | None, output_ids: torch.Tensor
) -> None:
    """Fill one row (V) int16 of `counts` for a request that starts, or whose tokens were taken back.

    Ids are int64 on the table's device; no prompt: it has no repetition penalty. Nothing waits for the device.
    """
    counts = torch.zeros(table.shape[0], dtype=torch.int32, device=table.device)
    counts.scatter_add_(0, output_ids, torch.ones_like(output_ids, dtype=torch.int32))
    counts.clamp_(max=MAX_COUNT)
    table.copy_(counts)
    if prompt_ids is not None:
        seen = torch.zeros_like(table).scatter_(0, prompt_ids, IN_PROMPT)
        table.bitwise_or_(seen)


def reference(logits: torch.Tensor, edits: LogitEdits, positions: torch.Tensor) -> torch.Tensor:
    """Edited float32 logits (R, V) of the formula, row by row in torch operations."""
    z = logits.float().clone()
    for row in range(z.shape[0]):
        table = int(edits.tables[row])
        if table >= 0:
            count = edits.counts[table].int()
            factor = edits.repetition[row]
            penalised = torch.where(z[row] > 0, z[row] / factor, z[row] * factor)
            z[row] = torch.where(count != 0, penalised, z[row])
            num = (count & MAX_COUNT).float()
            z[row] -= edits.frequency[row] * num + edits.presence[row] * (num > 0)
        num_biases, num_ends = int(edits.num_biases[row]), int(edits.num_ends[row])
        z[row, edits.bias_ids[row, :num_biases].long()] += edits.biases[row, :num_biases]
        if positions[row] < edits.min_tokens[row]:
            z[row, edits.end_ids[row, :num_ends].long()] = float("-inf")
    return z
