"""Causal attention within whole sequences, differentiable, with the bits of the engine's attention.

    out[t, h] = sum_j softmax_j(scale q[t, h] . k[j, h // G]) v[j, h // G],   j in t's sequence, t - window < j <= t

T tokens of N sequences, one after another without padding, H query heads, K KV heads, G = H / K, D head size.

For a trainer's forward: keys and values are laid out as a pool in which each sequence has blocks of its own, and
`paged_prefill` attends deterministically. So the result of a token has the bits that an engine with `deterministic`
computed for it, in whatever batch, chunks and blocks. The backward is torch's attention, recomputed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from .paged_prefill import paged_prefill

BLOCK_SIZE = 64
"""Of the pool that is made; the bits do not depend on it."""
_PADDED_TOKENS = 1 << 16
"""Of a call of torch's attention in the backward, padding included."""


@dataclass(frozen=True)
class SequenceLayout:
    """Where sequences lie among T tokens and in a pool; made once for all layers, which then wait for no upload."""

    lengths: tuple[int, ...]
    """(N): they add up to T."""
    device: torch.device
    """Of the tensors."""

    @cached_property
    def num_blocks(self) -> int:
        """Blocks of a pool in which each sequence has its own."""
        return sum(-(-length // BLOCK_SIZE) for length in self.lengths)

    @cached_property
    def tables(self) -> torch.Tensor:
        """(N, most blocks) int32; entries past a sequence's last block name other blocks, and are not read."""
        blocks = [-(-length // BLOCK_SIZE) for length in self.lengths]
        firsts = torch.tensor([0, *accumulate(blocks)][:-1], dtype=torch.int32)
        steps = torch.arange(max(blocks, default=0), dtype=torch.int32)
        return (firsts[:, None] + steps).to(self.device)

    @cached_property
    def slots(self) -> torch.Tensor:
        """(T) int64: where in the pool each token's key and value are."""
        parts, first = [], 0
        for length in self.lengths:
            parts.append(torch.arange(first, first + length))
            first += -(-length // BLOCK_SIZE) * BLOCK_SIZE
        return torch.cat(parts).to(self.device)

    @cached_property
    def starts(self) -> torch.Tensor:
        """(N + 1) int32: where each sequence starts, and T."""
        return torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32, device=self.device)

    @cached_property
    def seq_lens(self) -> torch.Tensor:
        """(N) int32."""
        return torch.tensor(self.lengths, dtype=torch.int32, device=self.device)

    @cached_property
    def groups(self) -> tuple[PaddedSequences, ...]:
        """Sequences of similar lengths side by side, at most a quarter of them padding."""
        ends = list(accumulate(self.lengths))
        order = sorted(
            (length, end) for length, end in zip(self.lengths, ends, strict=True) if length
        )
        groups: list[list[tuple[int, int]]] = []
        total = 0
        for length, end in order:
            padded = (len(groups[-1]) + 1) * length if groups else 0
            if not groups or 3 * padded > 4 * (total + length) or padded > _PADDED_TOKENS:
                groups.append([])
                total = 0
            groups[-1].append((length, end))
            total += length
        return tuple(PaddedSequences.of(group, self.device) for group in groups)


@dataclass(frozen=True, slots=True, kw_only=True)
class PaddedSequences:
    """B sequences, padded at their ends to L tokens, which a causal query does not see."""

    rows: torch.Tensor
    """(B, L) int64: the token at each place; padding repeats a sequence's last."""
    real: torch.Tensor
    """(real tokens) int64: the places, counted over (B, L), that are no padding."""

    @classmethod
    def of(cls, sequences: Sequence[tuple[int, int]], device: torch.device) -> PaddedSequences:
        """Of (length, row past the last) each."""
        lengths = torch.tensor([length for length, _ in sequences])[:, None]
        ends = torch.tensor([end for _, end in sequences])[:, None]
        steps = torch.arange(int(lengths.max()))[None]
        rows = ends - lengths + torch.minimum(steps, lengths - 1)
        real = (steps < lengths).flatten().nonzero().squeeze(1)
        return cls(rows=rows.to(device), real=real.to(device))


def sequence_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: SequenceLayout,
    *,
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """q (T, H, D), k and v (T, K, D), in 16-bit types or float32, to (T, H, D)."""
    if sum(layout.lengths) != q.shape[0]:
        raise ValueError(
            f"cannot attend within sequences: got lengths that add up to {sum(layout.lengths)}, expected the "
            f"{q.shape[0]} tokens of the queries; pack the sequences without padding"
        )
    return _SequenceAttention.apply(q, k, v, layout, scale, window)


class _SequenceAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layout: SequenceLayout,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.layout, ctx.scale, ctx.window = layout, scale, window
        pool = k.new_empty((layout.num_blocks, BLOCK_SIZE, 2, *k.shape[1:]))
        pool.view(-1, 2, *k.shape[1:])[layout.slots] = torch.stack((k, v), 1)
        return paged_prefill(
            q.contiguous(),
            pool,
            layout.tables,
            layout.starts,
            layout.seq_lens,
            torch.empty_like(q, memory_format=torch.contiguous_format),
            scale=scale,
            window=window,
            max_query_len=max(layout.lengths, default=0),
            deterministic=True,
        )

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[Any, ...]:
        saved = ctx.saved_tensors  # once: under activation checkpointing a second look is an error
        grads = [torch.empty_like(tensor) for tensor in saved]
        for group in ctx.layout.groups:
            with torch.enable_grad():
                parts = [t[group.rows].detach().requires_grad_() for t in saved]
                out = _torch_attention(*parts, scale=ctx.scale, window=ctx.window)
            # Padding has no gradient, so what it attended to does not matter.
            whole = grad_outputs[0].new_zeros(out.shape)
            tokens = group.rows.flatten()[group.real]
            whole.flatten(0, 1)[group.real] = grad_outputs[0][tokens]
            found = torch.autograd.grad(out, parts, whole)
            for grad, part in zip(grads, found, strict=True):
                grad[tokens] = part.flatten(0, 1)[group.real]
        return (*grads, None, None, None)


def _rows(lengths: Sequence[int]) -> Iterator[slice]:
    for end, length in zip(accumulate(lengths), lengths, strict=True):
        if length:
            yield slice(end - length, end)


def _torch_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, window: int | None
) -> torch.Tensor:
    """The formula for sequences of one length, (B, L, heads, D), by torch."""
    mask = None
    length = q.shape[1]
    if window is not None and window < length:
        at = torch.arange(length, device=q.device)
        behind = at[:, None] - at[None]
        mask = (behind >= 0) & (behind < window)
    attended = scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return attended.transpose(1, 2)


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: Sequence[int],
    *,
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """The formula in float64, differentiable."""
    q, k, v = q.double(), k.double(), v.double()
    parts = [
        _torch_attention(q[None, rows], k[None, rows], v[None, rows], scale=scale, window=window)[0]
        for rows in _rows(lengths)
    ]
    return torch.cat(parts) if parts else torch.zeros_like(q)
