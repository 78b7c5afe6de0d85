"""Matrix products of a few rows on a GPU. Loads triton, which only CUDA needs."""

from __future__ import annotations

import torch

from rollout_kernels.few_rows_matmul import few_rows_config, few_rows_linear

from .linear import project


def project_few(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`project`, but by a kernel of ours where that has been measured to be faster on this device."""
    config = few_rows_config(x, weight)
    if config is None:
        return project(x, weight, bias, out)
    return few_rows_linear(x, weight, bias, out, config)
