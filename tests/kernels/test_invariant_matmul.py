"""A linear layer's rows have one set of bits, whatever else is in the batch and however the work is spread."""

from __future__ import annotations

import torch
from interpreted import Checks, poisoned, relative_error

from rollout_kernels import invariant_matmul
from rollout_kernels.invariant_matmul import invariant_linear

CHECKS = Checks()
TOLERANCE = {torch.float32: 1e-6, torch.float16: 8e-4, torch.bfloat16: 6e-3}
ON_GPU = (torch.float32, torch.float16, torch.bfloat16)
INTERPRETED = (torch.float32, torch.float16)
"""bfloat16 products are wrong in the interpreter."""


def operands(
    rows: int, columns: int, depth: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows * 7 + columns)
    made = [
        torch.randn(shape, generator=generator)
        for shape in ((rows, depth), (columns, depth), (columns,))
    ]
    x, weight, bias = (tensor.to(dtype).to(device) for tensor in made)
    return x, weight / depth**0.5, bias


def dtypes(device: torch.device) -> tuple[torch.dtype, ...]:
    return ON_GPU if device.type == "cuda" else INTERPRETED


@CHECKS.add(
    {"rows": 1, "columns": 1, "depth": 1},
    {"rows": 3, "columns": 70, "depth": 40},
    {"rows": 5, "columns": 96, "depth": 1500},
    {"rows": 130, "columns": 200, "depth": 600},
    {"rows": 2, "columns": 65, "depth": 5000},
)
def product(device: torch.device, rows: int, columns: int, depth: int) -> None:
    for dtype in dtypes(device):
        x, weight, bias = operands(rows, columns, depth, dtype, device)
        for given in (None, bias):
            out = poisoned((rows, columns), dtype, device)
            assert invariant_linear(x, weight, given, out) is out
            want = invariant_matmul.reference(x, weight, given)
            assert relative_error(out, want) < TOLERANCE[dtype]


@CHECKS.add({"depth": 96}, {"depth": 1100}, {"depth": 4200})
def bits_in_any_batch(device: torch.device, depth: int) -> None:
    for dtype in dtypes(device):
        x, weight, bias = operands(140, 130, depth, dtype, device)
        whole = invariant_linear(x, weight, bias)
        for rows in (slice(0, 1), slice(63, 66), slice(100, 140), slice(139, 140)):
            assert torch.equal(invariant_linear(x[rows], weight, bias), whole[rows])
        # Fewer columns: as a projection of its own.
        for columns in (slice(0, 1), slice(60, 130)):
            part = invariant_linear(x[:7], weight[columns], bias[columns])
            assert torch.equal(part, whole[:7, columns])
        # Other neighbours: as in a batch of strangers.
        strangers = x.flip(0).contiguous()
        assert torch.equal(invariant_linear(strangers, weight, bias).flip(0), whole)


@CHECKS.add()
def rows_may_be_strided(device: torch.device) -> None:
    x, weight, bias = operands(4, 33, 64, torch.float32, device)
    wide = torch.full((4, 100), float("nan"), device=device)
    wide[:, 10:74] = x
    out = poisoned((4, 80), torch.float32, device)
    invariant_linear(wide[:, 10:74], weight, bias, out[:, 5:38])
    assert torch.equal(out[:, 5:38], invariant_linear(x, weight, bias))
    assert out[:, :5].isnan().all() and out[:, 38:].isnan().all()
    assert invariant_linear(x[:0], weight).shape == (0, 33)


verdicts, test_interpreted, test_on_gpu = CHECKS.as_tests(__file__)


if __name__ == "__main__":
    CHECKS.main()
