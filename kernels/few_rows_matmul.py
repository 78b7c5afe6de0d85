"""A linear layer of the few rows of a small decode batch, which is the reading of its weights.

    out[m, n] = round(sum_k x[m, k] w[n, k] + bias[n])

A program has some columns n and reads their weights once, in tiles that are under way several at a time; the weights
are the wide side of its products and the rows, padded to 8 or 16, the narrow one. cuBLAS takes 5 to 13 us for weights
of 4 to 12 MB on an H200, which can be read in 1 to 3. Which shapes gain, and with which tiles, is measured and stored
(`few_rows_configs.json`); all others are torch's.

M rows, K input features, N output features.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from .attention_tiles import precision, product
from .expert_configs import TileConfig
from .launching import (
    FEW_ROWS,
    chaining,
    device_name,
    jit,
    launching_on,
    take_turn,
    tl,
    triton,
)

FILE = Path(__file__).with_name("few_rows_configs.json")
"""By name of a device: shapes for which the kernel is faster than torch's product, with the shape of its launch."""


@jit
def _few_rows_kernel(  # type: ignore[no-untyped-def]
    x, w, bias, out, M, N, K, x_stride, w_stride, out_stride,
    HAS_BIAS: tl.constexpr, WHOLE: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """C columns of the formula above, for all rows; WHOLE: C divides N, and D divides K."""
    row, column = tl.arange(0, R), tl.program_id(0) * C + tl.arange(0, C)
    columns = column < N
    weights = w + column.to(tl.int64)[:, None] * w_stride
    if CHAINED:
        take_turn()
    total = tl.zeros((C, R), tl.float32)
    for start in range(0, K, D):
        k = start + tl.arange(0, D)
        if WHOLE:
            left = tl.load(weights + k[None, :])
            right = tl.load(x + row[None, :] * x_stride + k[:, None], row[None, :] < M, other=0.0)
        else:
            inside = k < K
            left = tl.load(weights + k[None, :], columns[:, None] & inside[None, :], other=0.0)
            right = tl.load(
                x + row[None, :] * x_stride + k[:, None],
                (row[None, :] < M) & inside[:, None],
                other=0.0,
            )
        total = product(left, right, total, PRECISION)
    if HAS_BIAS:
        total += tl.load(bias + column, columns, other=0.0).to(tl.float32)[:, None]
    tl.store(
        out + row[None, :] * out_stride + column[:, None],
        total.to(out.dtype.element_ty),
        (row[None, :] < M) & columns[:, None],
    )


def few_rows_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor | None,
    config: TileConfig,
) -> torch.Tensor:
    """x (M, K), weight (N, K) and bias (N), of one dtype (bfloat16, float16, float32), to (M, N), into `out` if any.

    At most `FEW_ROWS` rows; the last dimension of each is contiguous.
    """
    num_rows, depth = x.shape
    num_columns = weight.shape[0]
    if out is None:
        out = x.new_empty((num_rows, num_columns))
    assert 0 < num_rows <= FEW_ROWS and weight.shape[1] == depth
    assert out.shape == (num_rows, num_columns) and x.dtype == weight.dtype == out.dtype
    assert x.stride(1) == weight.stride(1) == out.stride(1) == 1
    kernel: Any = _few_rows_kernel
    with launching_on(x):
        kernel[(-(-num_columns // config.columns),)](
            x, weight, weight if bias is None else bias, out,
            num_rows, num_columns, depth, x.stride(0), weight.stride(0), out.stride(0),
            HAS_BIAS=bias is not None,
            WHOLE=num_columns % config.columns == 0 and depth % config.depth == 0,
            R=8 if num_rows <= 8 else FEW_ROWS, C=config.columns, D=config.depth,
            PRECISION=precision(x.dtype, x.device),
            num_warps=config.warps, num_stages=config.stages, **chaining(x),
        )  # fmt: skip
    return out


def few_rows_config(x: torch.Tensor, weight: torch.Tensor) -> TileConfig | None:
    """The stored launch for such a product; None where torch's is the faster, or nobody has measured."""
    if not 0 < x.shape[0] <= FEW_ROWS or weight.element_size() != 2 or triton is None:
        return None
    listed = _entries(device_name(x.device)).get((weight.shape[0], weight.shape[1]), ())
    return next((config for limit, config in listed if x.shape[0] <= limit), None)


@lru_cache(maxsize=16)
def _entries(
    name: str,
) -> Mapping[tuple[int, int], list[tuple[int, TileConfig | None]]]:
    """By (N, K): the most rows, ascending, and the launch up to so many, or None for torch's."""
    found: dict[tuple[int, int], list[tuple[int, TileConfig | None]]] = {}
    for entry in json.loads(FILE.read_text()).get(name, []):
        launch = entry["launch"]
        config = None if launch is None else TileConfig(**launch)
        found.setdefault((entry["outputs"], entry["inputs"]), []).append(
            (entry["max_rows"], config)
        )
    return found


def reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The formula in float64, (M, N)."""
    total = x.double() @ weight.double().t()
    return total if bias is None else total + bias.double()
