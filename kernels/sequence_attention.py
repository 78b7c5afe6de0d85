"""Causal attention within whole sequences, differentiable, with the bits of the engine's attention.

    out[t, h] = sum_j softmax_j(scale q[t, h] . k[j, h // G]) v[j, h // G],   j in t's sequence, t - window < j <= t

T tokens of N sequences, one after another without padding, H query heads, K KV heads, G = H / K, D head size.

For a trainer's forward: keys and values are laid out as a pool in which each sequence has blocks of its own, and
`paged_prefill` attends deterministically. So the result of a token has the bits that an engine with `deterministic`
computed for it, in whatever batch, chunks and blocks. The backward is torch's attention, recomputed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from .paged_prefill import paged_prefill

BLOCK_SIZE = 64
"""Of the pool that is made; the bits do not depend on it."""


def sequence_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: Sequence[int],
    *,
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """q (T, H, D), k and v (T, K, D), in 16-bit types or float32, to (T, H, D); `lengths` (N) add up to T."""
    if sum(lengths) != q.shape[0]:
        raise ValueError(
            f"cannot attend within sequences: got lengths that add up to {sum(lengths)}, expected the "
            f"{q.shape[0]} tokens of the queries; pack the sequences without padding"
        )
    return _SequenceAttention.apply(q, k, v, tuple(lengths), scale, window)


class _SequenceAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        lengths: tuple[int, ...],
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.lengths, ctx.scale, ctx.window = lengths, scale, window
        blocks = [-(-length // BLOCK_SIZE) for length in lengths]
        firsts = [end - count for end, count in zip(accumulate(blocks), blocks, strict=True)]
        steps = torch.arange(max(blocks, default=0), dtype=torch.int32, device=q.device)
        # Entries past a sequence's last block name other blocks, and are not read.
        tables = _numbers(firsts, q)[:, None] + steps[None]
        pool = k.new_empty((sum(blocks), BLOCK_SIZE, 2, *k.shape[1:]))
        slots = torch.cat(
            [
                torch.arange(first * BLOCK_SIZE, first * BLOCK_SIZE + length)
                for first, length in zip(firsts, lengths, strict=True)
            ]
        )
        pool.view(-1, 2, *k.shape[1:])[slots.to(q.device)] = torch.stack((k, v), 1)
        return paged_prefill(
            q.contiguous(),
            pool,
            tables,
            _numbers([0, *accumulate(lengths)], q),
            _numbers(lengths, q),
            torch.empty_like(q, memory_format=torch.contiguous_format),
            scale=scale,
            window=window,
            max_query_len=max(lengths, default=0),
            deterministic=True,
        )

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[Any, ...]:
        saved = ctx.saved_tensors  # once: under activation checkpointing a second look is an error
        grads = [torch.empty_like(tensor) for tensor in saved]
        for rows in _rows(ctx.lengths):
            with torch.enable_grad():
                parts = [t[rows].detach().requires_grad_() for t in saved]
                out = _torch_attention(*parts, scale=ctx.scale, window=ctx.window)
            found = torch.autograd.grad(out, parts, grad_outputs[0][rows])
            for grad, part in zip(grads, found, strict=True):
                grad[rows] = part
        return (*grads, None, None, None)


def _numbers(values: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=like.device)


def _rows(lengths: Sequence[int]) -> Iterator[slice]:
    for end, length in zip(accumulate(lengths), lengths, strict=True):
        if length:
            yield slice(end - length, end)


def _torch_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, window: int | None
) -> torch.Tensor:
    """The formula for one sequence, by torch."""
    mask = None
    if window is not None and window < q.shape[0]:
        at = torch.arange(q.shape[0], device=q.device)
        behind = at[:, None] - at[None]
        mask = (behind >= 0) & (behind < window)
    attended = scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        k.transpose(0, 1)[None],
        v.transpose(0, 1)[None],
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return attended[0].transpose(0, 1)


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
        _torch_attention(q[rows], k[rows], v[rows], scale=scale, window=window)
        for rows in _rows(lengths)
    ]
    return torch.cat(parts) if parts else torch.zeros_like(q)
