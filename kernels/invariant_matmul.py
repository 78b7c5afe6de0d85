"""A linear layer whose rows have the same bits in any batch.

    out[m, n] = round(sum_s (sum over k in part s of x[m, k] w[n, k]) + bias[n]),    parts s in order

K is cut into at most 8 parts, as many as K alone says. Each part is summed from its first element to its last, a tile
at a time, in float32, and the parts are added one after another. A tile has one shape for all products, so a row's bits
do not depend on how many rows there are, nor on where in the batch it is; a column's not on how many columns the weight
has, so fused projections agree with separate ones. Where there are few tiles of output, each part has programs of its
own, and a second kernel adds the parts in the same order: the same bits again.

cuBLAS chooses tiles, parts and their order by the number of rows, which is why its rows change with the batch (He and
Thinking Machines Lab, "Defeating Nondeterminism in LLM Inference", 2025).

M rows, K input features, N output features.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from .launching import jit, launching_on, tl

_ROWS = 64
_COLUMNS = 64
_DEPTH = 64
_PART = 512
"""Features of a part, unless there would be more than `_MOST_PARTS`."""
_MOST_PARTS = 8
_GROUP = 8
"""Tiles of rows that take a column's weights in turn, while the cache holds them."""
_SUM_BLOCK = 1024
_CPU_PROGRAMS = 8
"""Where the interpreter changes from one program a part to one for all, so that tests see both."""


@jit
def _part_sum(  # type: ignore[no-untyped-def]
    x, w, row, column, rows, columns, x_stride, w_stride, first, end,
    R: tl.constexpr, C: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(R, C) float32: products over features [first, end)."""
    total = tl.zeros((R, C), tl.float32)
    for start in range(first, end, D):
        k = start + tl.arange(0, D)
        inside = k < end
        left = tl.load(
            x + row[:, None] * x_stride + k[None, :],
            mask=rows[:, None] & inside[None, :],
            other=0.0,
        )
        right = tl.load(
            w + column[None, :] * w_stride + k[:, None],
            mask=columns[None, :] & inside[:, None],
            other=0.0,
        )
        total = tl.dot(left, right, total, input_precision=PRECISION)
    return total


@jit
def _matmul_kernel(  # type: ignore[no-untyped-def]
    x, w, bias, out, parts, M, N, K, x_stride, w_stride, out_stride, PART,
    PARTS: tl.constexpr, APART: tl.constexpr, HAS_BIAS: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of the formula above; APART: one part of it, into parts (PARTS, M, N)."""
    row_tiles, column_tiles = tl.cdiv(M, R), tl.cdiv(N, C)
    number = tl.program_id(0)
    group = number // (GROUP * column_tiles)
    height = min(row_tiles - group * GROUP, GROUP)
    within = number % (GROUP * column_tiles)
    row = (group * GROUP + within % height) * R + tl.arange(0, R)
    column = (within // height) * C + tl.arange(0, C)
    rows, columns = row < M, column < N
    row, column = row.to(tl.int64), column.to(tl.int64)
    cell = rows[:, None] & columns[None, :]
    if APART:
        part = tl.program_id(1)
        total = _part_sum(
            x, w, row, column, rows, columns, x_stride, w_stride,
            part * PART, min((part + 1) * PART, K), R, C, D, PRECISION,
        )  # fmt: skip
        at = parts + (part.to(tl.int64) * M + row[:, None]) * N + column[None, :]
        tl.store(at, total, mask=cell)
    else:
        total = tl.zeros((R, C), tl.float32)
        for part in range(PARTS):
            total += _part_sum(
                x, w, row, column, rows, columns, x_stride, w_stride,
                part * PART, min((part + 1) * PART, K), R, C, D, PRECISION,
            )  # fmt: skip
        if HAS_BIAS:
            total += tl.load(bias + column, mask=columns, other=0.0).to(tl.float32)[None, :]
        tl.store(
            out + row[:, None] * out_stride + column[None, :],
            total.to(out.dtype.element_ty),
            mask=cell,
        )


@jit
def _add_parts_kernel(  # type: ignore[no-untyped-def]
    parts, bias, out, M, N, out_stride,
    PARTS: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK columns of one row: the parts in order, then the bias."""
    row = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < N
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(PARTS):
        at = parts + (part * M + row) * N + column
        total += tl.load(at, mask=inside, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + column, total.to(out.dtype.element_ty), mask=inside)


def invariant_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """x (M, K), weight (N, K) and bias (N), of one dtype (bfloat16, float16, float32), to (M, N), into `out` if any.

    The last dimension of each is contiguous. float32 is multiplied as float32.
    """
    num_rows, depth = x.shape
    num_columns = weight.shape[0]
    if out is None:
        out = x.new_empty((num_rows, num_columns))
    assert weight.shape[1] == depth and out.shape == (num_rows, num_columns)
    assert x.dtype == weight.dtype == out.dtype and (bias is None or bias.shape == (num_columns,))
    assert x.stride(1) == weight.stride(1) == out.stride(1) == 1
    if num_rows == 0:
        return out
    num_parts = min(_MOST_PARTS, -(-depth // _PART))
    # In whole tiles, so that every part but the last is one.
    part = -(-depth // (num_parts * _DEPTH)) * _DEPTH
    num_parts = -(-depth // part)
    tiles = -(-num_rows // _ROWS) * -(-num_columns // _COLUMNS)
    apart = num_parts > 1 and tiles < _num_programs(x.device)
    parts = out
    if apart:
        shape = (num_parts, num_rows, num_columns)
        parts = torch.empty(shape, dtype=torch.float32, device=x.device)
    kernel: Any = _matmul_kernel
    precision = "ieee" if x.dtype == torch.float32 else None
    with launching_on(x):
        kernel[(tiles, num_parts if apart else 1)](
            x, weight, weight if bias is None else bias, out, parts,
            num_rows, num_columns, depth, x.stride(0), weight.stride(0), out.stride(0), part,
            PARTS=num_parts, APART=apart, HAS_BIAS=bias is not None,
            R=_ROWS, C=_COLUMNS, D=_DEPTH, GROUP=_GROUP, PRECISION=precision,
            num_warps=4, num_stages=4,
        )  # fmt: skip
        if apart:
            _add_parts(parts, bias, out)
    return out


def _add_parts(parts: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    num_parts, num_rows, num_columns = parts.shape
    kernel: Any = _add_parts_kernel
    kernel[(-(-num_columns // _SUM_BLOCK), num_rows)](
        parts, parts if bias is None else bias, out, num_rows, num_columns, out.stride(0),
        PARTS=num_parts, HAS_BIAS=bias is not None, BLOCK=_SUM_BLOCK, num_warps=4,
    )  # fmt: skip


@lru_cache(maxsize=16)
def _num_programs(device: torch.device) -> int:
    """So many tiles keep the device busy."""
    if device.type != "cuda":
        return _CPU_PROGRAMS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The formula in float64, (M, N)."""
    product = x.double() @ weight.double().t()
    return product if bias is None else product + bias.double()
