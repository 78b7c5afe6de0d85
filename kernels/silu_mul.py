"""The gate of a feed-forward layer.

    out = round(round(gate * sigmoid(gate)) * up)

`round` is to the tensors' dtype; gate and up are the halves of one row, as the fused projection writes them.

T tokens, I feed-forward width.
"""

from __future__ import annotations

from typing import Any

import torch

from .launching import chaining, jit, launching_on, take_turn, tl

_BLOCK = 1024


@jit
def _silu_mul_kernel(  # type: ignore[no-untyped-def]
    fused, out, fused_stride, out_stride, WIDTH, BLOCK: tl.constexpr, CHAINED: tl.constexpr
):
    """BLOCK columns of one row of the formula above."""
    if CHAINED:
        take_turn()
    row = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    at = fused + row * fused_stride + column
    gate = tl.load(at, mask=inside, other=0.0)
    up = tl.load(at + WIDTH, mask=inside, other=0.0)
    wide = gate.to(tl.float32)
    gated = tl.div_rn(wide, 1.0 + tl.exp(-wide)).to(gate.dtype)
    product = (gated.to(tl.float32) * up.to(tl.float32)).to(gate.dtype)
    tl.store(out + row * out_stride + column, product, mask=inside)


def silu_mul(fused: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """fused (T, 2 I), gate before up, into out (T, I), of the same dtype; columns contiguous. Returns `out`."""
    num_rows, width = out.shape
    assert fused.shape == (num_rows, 2 * width) and fused.dtype == out.dtype
    assert fused.stride(1) == out.stride(1) == 1
    kernel: Any = _silu_mul_kernel
    blocks = -(-width // _BLOCK)
    for first in range(0, num_rows, 65535):  # the most that a grid's second axis takes
        rows = slice(first, min(first + 65535, num_rows))
        with launching_on(out):
            kernel[(blocks, rows.stop - first)](
                fused[rows],
                out[rows],
                fused.stride(0),
                out.stride(0),
                width,
                BLOCK=_BLOCK,
                num_warps=4,
                **chaining(out, num_rows),
            )
    return out


def reference(fused: torch.Tensor) -> torch.Tensor:
    """The formula in torch operations."""
    gate, up = fused.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up
