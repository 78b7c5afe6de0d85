"""The engine's kernels as differentiable functions, for a trainer's forward with the engine's bits.

Each forward is the kernel that an engine with `deterministic` runs; each backward is torch's, of the same formula, and
recomputes what it needs. A gradient is that of the formula, not of its roundings.

T tokens, E hidden size, V vocabulary, H query heads, K KV heads, D head size, I feed-forward width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import fused_norm, qk_norm_rope
from . import silu_mul as gates
from .invariant_matmul import invariant_linear
from .logit_stats import MOST_ROWS, LogitStats, compute_stats
from .qk_norm_rope import HeadNorms
from .token_logprobs import gather_logprobs

Tensors = tuple[torch.Tensor, ...]
_LOGIT_BYTES = 1 << 28
"""Logits that exist at a time, forward and backward."""
_SLOTS = 64


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x (T, K), weight (N, K), bias (N) -> (T, N)."""
    result: torch.Tensor = _Linear.apply(x, weight, bias)
    return result


def add_rms_norm(
    residual: torch.Tensor, x: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """residual (T, E), x (T, E) -> their sum, and its norm; without x the residual itself, and its norm."""

    def kernel(residual: torch.Tensor, weight: torch.Tensor, *added: torch.Tensor) -> Tensors:
        total = residual.clone()
        out = torch.empty_like(total)
        fused_norm.add_rms_norm(total, added[0] if added else None, weight, eps, out)
        return total, out

    def formula(residual: torch.Tensor, weight: torch.Tensor, *added: torch.Tensor) -> Tensors:
        return fused_norm.reference(residual, added[0] if added else None, weight, eps)

    total, normed = _apply(kernel, formula, residual, weight, *(() if x is None else (x,)))
    return total, normed


def rotated(
    qkv: torch.Tensor,
    table: torch.Tensor,
    positions: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    norms: HeadNorms | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """qkv (T, (H + 2 K) D), table (P, D), positions (T) -> queries (T, H, D), keys and values (T, K, D)."""
    size = table.shape[1]

    def weights(given: Tensors) -> HeadNorms | None:
        if norms is None:
            return None
        return HeadNorms(query=given[0], key=given[1], eps=norms.eps)

    def kernel(qkv: torch.Tensor, *given: torch.Tensor) -> Tensors:
        num_tokens = qkv.shape[0]
        pool = qkv.new_empty((-(-num_tokens // _SLOTS), _SLOTS, 2, num_kv_heads, size))
        slots = torch.arange(num_tokens, device=qkv.device)
        queries = qkv.new_empty((num_tokens, num_heads * size))
        qk_norm_rope.rotate_and_store(
            qkv, pool, table, positions, slots, norms=weights(given), q_out=queries
        )
        keys, values = pool.view(-1, 2, num_kv_heads, size)[:num_tokens].unbind(1)
        return queries.view(-1, num_heads, size), keys.contiguous(), values.contiguous()

    def formula(qkv: torch.Tensor, *given: torch.Tensor) -> Tensors:
        queries, pairs = qk_norm_rope.reference(
            qkv, table, positions, num_heads, num_kv_heads, weights(given)
        )
        return queries, *pairs.unbind(1)

    given = () if norms is None else (norms.query, norms.key)
    queries, keys, values = _apply(kernel, formula, qkv, *given)
    return queries, keys, values


def silu_mul(fused: torch.Tensor) -> torch.Tensor:
    """fused (T, 2 I), gate before up -> (T, I)."""

    def kernel(fused: torch.Tensor) -> Tensors:
        return (gates.silu_mul(fused, fused.new_empty((fused.shape[0], fused.shape[1] // 2))),)

    (out,) = _apply(kernel, lambda fused: (gates.reference(fused),), fused)
    return out


def head_logprobs(
    hidden: torch.Tensor, weight: torch.Tensor, token_ids: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Log-probabilities (T), float32, of token_ids (T) after hidden (T, E) through the head `weight` (V, E).

    As drawn with `temperature` > 0. At no time are there more logits than 256 MB.
    """
    result: torch.Tensor = _HeadLogprobs.apply(hidden, weight, token_ids, temperature)
    return result


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return invariant_linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,), (x, weight) = grad_outputs, ctx.saved_tensors
        wanted = ctx.needs_input_grad
        return (
            grad @ weight if wanted[0] else None,
            grad.t() @ x if wanted[1] else None,
            grad.sum(0) if wanted[2] else None,
        )


def _apply(
    kernel: Callable[..., Tensors], formula: Callable[..., Tensors], *tensors: torch.Tensor
) -> Tensors:
    result: Tensors = _Recomputed.apply(kernel, formula, *tensors)
    return result


class _Recomputed(torch.autograd.Function):
    """`kernel(*tensors)`, with the gradients of `formula(*tensors)`."""

    @staticmethod
    def forward(
        ctx: Any,
        kernel: Callable[..., Tensors],
        formula: Callable[..., Tensors],
        *tensors: torch.Tensor,
    ) -> Tensors:
        ctx.save_for_backward(*tensors)
        ctx.formula = formula
        return kernel(*tensors)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[Any, ...]:
        wanted = ctx.needs_input_grad[2:]
        with torch.enable_grad():
            parts = [
                tensor.detach().requires_grad_(needs)
                for tensor, needs in zip(ctx.saved_tensors, wanted, strict=True)
            ]
            outputs = ctx.formula(*parts)
        sought = [part for part in parts if part.requires_grad]
        pairs = [
            (out, grad)
            for out, grad in zip(outputs, grad_outputs, strict=True)
            if out.requires_grad
        ]
        outs, grads = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(outs, sought, grads))
        return (None, None, *(next(found) if needs else None for needs in wanted))


class _HeadLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        token_ids: torch.Tensor,
        temperature: float,
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden, weight, token_ids)
        ctx.temperature = temperature
        out = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        step = _rows_at_once(weight)
        stats = LogitStats.allocate(min(step, len(hidden)), weight.shape[0], hidden.device)
        for first in range(0, len(hidden), step):
            rows = slice(first, min(first + step, len(hidden)))
            logits = invariant_linear(hidden[rows], weight)
            heat = out.new_full((len(logits),), temperature)
            compute_stats(logits, heat, stats)
            gather_logprobs(logits, heat, token_ids[rows], stats, out[rows])
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,), (hidden, weight, token_ids) = grad_outputs, ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        step = _rows_at_once(weight)
        for first in range(0, len(hidden), step):
            rows = slice(first, min(first + step, len(hidden)))
            wide = (hidden[rows] @ weight.t()).float() / ctx.temperature
            share = torch.softmax(wide, -1).neg_()
            share.scatter_add_(1, token_ids[rows, None].long(), torch.ones_like(share[:, :1]))
            share = (share * (grad[rows, None] / ctx.temperature)).to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = share @ weight
            if grad_weight is not None:
                grad_weight.addmm_(share.t(), hidden[rows])
        return grad_hidden, grad_weight, None, None


def _rows_at_once(weight: torch.Tensor) -> int:
    return min(max(1, _LOGIT_BYTES // (4 * weight.shape[0])), MOST_ROWS)
