"""Root-mean-square norm, and the addition to the residual stream before it, in one pass.

    residual' = round(residual + x)                                        in place; left out where there is no x
    out       = round(weight * round(residual' / sqrt(mean(residual'^2) + eps)))

`round` is to the tensors' dtype; statistics and quotient are float32. A row's values depend on that row alone.

T tokens, E hidden size.
"""

from __future__ import annotations

from typing import Any

import torch

from .launching import chaining, jit, launching_on, next_power_of_two, take_turn, tl


@jit
def _norm_kernel(  # type: ignore[no-untyped-def]
    residual,
    x,
    weight,
    out,
    residual_stride,
    x_stride,
    out_stride,
    eps,
    E: tl.constexpr,
    EP: tl.constexpr,
    HAS_X: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """One row of the formula above; E is padded to a power of two, EP."""
    if CHAINED:
        take_turn()
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, EP)
    inside = column < E
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(residual + row * residual_stride + column, mask=inside, other=0.0)
    if HAS_X:
        added = tl.load(x + row * x_stride + column, mask=inside, other=0.0)
        value = (value.to(tl.float32) + added.to(tl.float32)).to(value.dtype)
        tl.store(residual + row * residual_stride + column, value, mask=inside)
    wide = value.to(tl.float32)
    mean = tl.sum(wide * wide, 0) / E
    normed = (wide * tl.rsqrt(mean + eps)).to(value.dtype)
    tl.store(
        out + row * out_stride + column,
        (normed.to(tl.float32) * scale).to(value.dtype),
        mask=inside,
    )


def add_rms_norm(
    residual: torch.Tensor,
    x: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor,
) -> torch.Tensor:
    """residual (T, E) += x (T, E), then its norm into out (T, E), which may be `x`; x None: the norm alone.

    All of one dtype (bfloat16, float16, float32); rows may be strided, columns not. Returns `out`.
    """
    num_rows, size = residual.shape
    assert residual.stride(1) == out.stride(1) == 1 and out.shape == residual.shape
    assert residual.dtype == out.dtype == weight.dtype and weight.shape == (size,)
    assert x is None or (x.shape == residual.shape and x.stride(1) == 1)
    if num_rows == 0:
        return out
    kernel: Any = _norm_kernel
    padded = next_power_of_two(size)
    with launching_on(residual):
        kernel[(num_rows,)](
            residual,
            residual if x is None else x,
            weight,
            out,
            residual.stride(0),
            0 if x is None else x.stride(0),
            out.stride(0),
            eps,
            E=size,
            EP=padded,
            HAS_X=x is not None,
            # 8 elements per thread and up: a function of the size alone, so that sums have one order.
            num_warps=min(max(padded // 256, 1), 16),
            **chaining(residual, num_rows),
        )
    return out


def reference(
    residual: torch.Tensor, x: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(residual', out) of the formula, in torch operations."""
    total = residual if x is None else residual + x
    wide = total.float()
    normed = wide * (wide.pow(2).mean(-1, keepdim=True) + eps).rsqrt()
    return total, normed.to(total.dtype) * weight
