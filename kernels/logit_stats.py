"""Per chunk of the vocabulary, the largest logit and the sum of weights, in one pass over the logits.

For chunk c (CHUNK neighbouring columns) of row r with temperature T:

    maxima[r, c] = max over v in c of z[r, v]
    sums[r, c]   = sum over v in c of exp((z[r, v] - maxima[r, c]) / T)         in float32

from which all else follows: the sum of the whole row, its logarithm, the chunk in which a draw falls, the largest
elements. Once for the raw logits and, for rows that something edits, once more for the edited ones. A chunk of minus
infinities has the sum 0; a NaN or plus infinity makes its sum NaN. A chunk's values depend on its own columns
alone: neither on the other rows nor on how many there are.

R rows, V vocabulary, C chunks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from . import logit_edits
from .launching import jit, launching_on, next_power_of_two, tl
from .logit_edits import LogitEdits, edit, is_edited

CHUNK = 512
"""Columns of a chunk."""
MOST_ROWS = 65535
"""Rows of one launch: what the second axis of a grid has room for."""
_CHUNKS = 4
"""Chunks that one program reads."""
_WARPS = 2
_EDITED_WARPS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitStats:
    """The chunks of some rows."""

    maxima: torch.Tensor
    """(2, R, C) float32: of raw logits, and of edited ones in rows that are edited."""
    sums: torch.Tensor
    """(3, R, C) float32: likewise, and of what filters leave in rows that are filtered."""

    @classmethod
    def allocate(cls, num_rows: int, vocab_size: int, device: torch.device) -> LogitStats:
        """Memory for up to `num_rows` rows, 20 bytes per chunk."""
        num_chunks = -(-vocab_size // CHUNK)
        return cls(
            maxima=torch.empty(2, num_rows, num_chunks, dtype=torch.float32, device=device),
            sums=torch.empty(3, num_rows, num_chunks, dtype=torch.float32, device=device),
        )

    def arguments(self) -> dict[str, Any]:
        """As the kernels take them."""
        assert self.maxima.is_contiguous() and self.sums.is_contiguous()
        num_chunks = self.maxima.shape[2]
        return {
            "maxima": self.maxima,
            "sums": self.sums,
            "plane": self.maxima.stride(0),
            "num_chunks": num_chunks,
            "CHUNK": CHUNK,
        }

    @property
    def padded_chunks(self) -> int:
        """C as a power of two."""
        return next_power_of_two(self.maxima.shape[2])


@jit
def row_totals(maxima, sums, num_chunks, factor, NUM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of one row's chunks (pointers to the first): chunk maxima (NUM), the row's maximum, what a chunk's sum is to be
    multiplied with (NUM), and chunk sums relative to the row's maximum, (NUM) float64; `factor` is log2(e) / T."""
    chunk = tl.arange(0, NUM)
    m = tl.load(maxima + chunk, mask=chunk < num_chunks, other=float("-inf"))
    s = tl.load(sums + chunk, mask=chunk < num_chunks, other=0.0)
    peak = tl.max(m, 0)
    scale = tl.where(m == float("-inf"), 0.0, tl.exp2((m - peak) * factor))
    return m, peak, scale, (s * scale).to(tl.float64)


@jit
def _stats_kernel(  # type: ignore[no-untyped-def]
    logits,
    logit_rows,
    temperature,
    positions,
    stride,
    V,
    tiles,
    maxima,
    sums,
    plane,
    num_chunks,
    edits,
    B: tl.constexpr,
    E: tl.constexpr,
    EDITS: tl.constexpr,
    INDEXED: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """`tiles` times CHUNKS chunks of one row; with EDITS, edited, of a row that is."""
    row = tl.program_id(1)
    wanted = True
    position = 0
    if EDITS:
        position = tl.load(positions + row)
        wanted = is_edited(row, position, edits)
    if wanted:
        source = row.to(tl.int64)
        if INDEXED:
            source = tl.load(logit_rows + row).to(tl.int64)
        factor = 1.4426950408889634 / tl.load(temperature + row)
        for i in range(tiles):
            chunk = (tl.program_id(0) * tiles + i) * CHUNKS + tl.arange(0, CHUNKS)
            column = chunk[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
            at = logits + source * stride + column
            z = tl.load(at, mask=column < V, other=float("-inf")).to(tl.float32)
            to = row.to(tl.int64) * num_chunks + chunk
            if EDITS:
                first = (tl.program_id(0) * tiles + i) * CHUNKS * CHUNK
                end = first + CHUNKS * CHUNK
                z = edit(z, column, first, end, row, position, V, edits, B, E)
                to += plane
            inside = chunk < num_chunks
            m = tl.max(z, 1)
            base = tl.where(m == float("-inf"), 0.0, m)
            s = tl.sum(tl.exp2((z - base[:, None]) * factor), 1)
            tl.store(maxima + to, m, mask=inside)
            tl.store(sums + to, s, mask=inside)


def tiles_per_program(num_rows: int, num_tiles: int) -> int:
    """How many tiles a program takes of a row in which it may have nothing to do. Results do not depend on it.

    Programs that end at once cost a nanosecond each; programs that have something to do read their tiles one by one.
    """
    return min(max(num_rows * num_tiles // 4096, 1), 4)


def compute_stats(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    stats: LogitStats,
    *,
    logit_rows: torch.Tensor | None = None,
    edits: LogitEdits | None = None,
    positions: torch.Tensor | None = None,
) -> None:
    """Fill the first R rows of `stats`, R the length of `temperature` (R) float32 > 0.

    Row r is row r of logits (rows, V), of any float dtype, or `logit_rows[r]` (R) int32. `positions` (R) integers are
    needed with `edits`. Columns must be contiguous, rows may be strided.
    """
    num_rows, vocab_size = len(temperature), logits.shape[1]
    assert logits.stride(1) == 1 and MOST_ROWS >= stats.maxima.shape[1] >= num_rows
    assert stats.maxima.shape[2] == -(-vocab_size // CHUNK)
    assert edits is None or positions is not None
    kernel: Any = _stats_kernel
    num_tiles = -(-stats.maxima.shape[2] // _CHUNKS)
    with launching_on(logits):
        for part in (None,) if edits is None else (None, edits):
            tiles = 1 if part is None else tiles_per_program(num_rows, num_tiles)
            kernel[(-(-num_tiles // tiles), num_rows)](
                logits,
                temperature if logit_rows is None else logit_rows,
                temperature,
                temperature if positions is None else positions,
                logits.stride(0),
                vocab_size,
                tiles,
                **stats.arguments(),
                **logit_edits.arguments(part),
                INDEXED=logit_rows is not None,
                CHUNKS=_CHUNKS,
                num_warps=_WARPS if part is None else _EDITED_WARPS,
                enable_fp_fusion=False,  # edits are rounded step by step
            )


def reference(logits: torch.Tensor, temperature: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(R, C) maxima and sums of the formula, in torch operations."""
    padding = -logits.shape[1] % CHUNK
    z = torch.nn.functional.pad(logits.float(), (0, padding), value=float("-inf"))
    chunks = z.unflatten(1, (-1, CHUNK))
    maxima = chunks.amax(-1)
    base = torch.where(maxima == float("-inf"), 0.0, maxima)
    weights = ((chunks - base.unsqueeze(-1)) / temperature[:, None, None]).exp()
    return maxima, weights.sum(-1)
