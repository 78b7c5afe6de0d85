"""Matrix products whose weights are split over tensor-parallel ranks.

T tokens, K input features, N output features of this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Protocol

import torch
from torch import nn
from torch.nn.functional import linear

from weight_sync.layout.weight_map import Placement

from .shards import OutputRows, split_evenly
from .single_group import TensorParallelGroup


class Product(Protocol):
    """How linear layers multiply."""

    def __call__(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x (T, K) times weight (N, K) transposed, plus bias (N): (T, N), a new tensor or `out`."""


def project(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The fastest `Product`.

    In float32 on a CPU oneDNN is asked for the product where this torch has it: 480 GFLOP/s on two cores with AVX-512,
    where `torch.nn.functional.linear`, which goes through MKL, reaches 215 (T=512, K=512, N=2752, one run).
    """
    if out is not None:
        return (
            torch.mm(x, weight.t(), out=out)
            if bias is None
            else torch.addmm(bias, x, weight.t(), out=out)
        )
    if x.dtype == torch.float32 and x.device.type == "cpu" and (product := _onednn()) is not None:
        return product(x, weight, bias, "none", [], "")
    return linear(x, weight, bias)


@cache
def _onednn() -> Callable[..., torch.Tensor] | None:
    """oneDNN's product, which torch does not export; None where it is missing, or does not do what it did."""
    try:
        product = torch.ops.mkldnn._linear_pointwise
        x, weight, bias = torch.ones(2, 3), torch.arange(12.0).view(4, 3), torch.ones(4)
        with torch.no_grad():
            same = torch.allclose(product(x, weight, bias, "none", [], ""), linear(x, weight, bias))
    except (AttributeError, RuntimeError, TypeError):
        return None
    return product if same else None


class ColumnParallelLinear(nn.Module):
    """One or several projections of the same input in one product; each rank computes a part of every output.

    The rows of the fused weight lie in the order of `outputs`, so q, k, v (or gate and up) are neighbours in memory.
    """

    def __init__(
        self, name: str, in_features: int, outputs: tuple[OutputRows, ...], *, bias: bool
    ) -> None:
        super().__init__()
        self.product: Product = project
        self.name = name
        self.outputs = outputs
        self.out_features = sum(output.size for output in outputs)
        self.weight = nn.Parameter(torch.empty(self.out_features, in_features), requires_grad=False)
        self.bias = (
            nn.Parameter(torch.empty(self.out_features), requires_grad=False) if bias else None
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (T, K) -> (T, N), this rank's outputs side by side."""
        return self.product(x, self.weight, self.bias)

    def placements(self, prefix: str) -> Iterator[Placement]:
        """Weights of all outputs, then their biases: the order in which the parameters lie in memory."""
        for kind, parameter in (("weight", self.weight), ("bias", self.bias)):
            if parameter is not None:
                parts = parameter.split([output.size for output in self.outputs])
                for output, part in zip(self.outputs, parts, strict=True):
                    yield from output.placements(prefix, kind, part)

    def fused_names(self, prefix: str) -> Iterator[tuple[str, tuple[str, ...]]]:
        """The name under which a trainer may send all outputs at once, and the names of its parts, top to bottom."""
        for kind, parameter in (("weight", self.weight), ("bias", self.bias)):
            if parameter is not None:
                parts = tuple(f"{prefix}.{output.name}.{kind}" for output in self.outputs)
                yield f"{prefix}.{self.name}.{kind}", parts


class RowParallelLinear(nn.Module):
    """A projection whose input is split over the ranks: partial products are summed, then the bias is added once."""

    def __init__(
        self, name: str, in_features: int, out_features: int, *, bias: bool, tp: TensorParallelGroup
    ) -> None:
        super().__init__()
        self.product: Product = project
        self.name = name
        self.tp = tp
        self.full_in_features = in_features
        self.start, size = split_evenly(f"the inputs of {name}", in_features, tp)
        self.out_features = out_features
        self.weight = nn.Parameter(torch.empty(out_features, size), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (T, K), this rank's inputs -> (T, N), complete on every rank."""
        if self.tp.size == 1:
            return self.product(x, self.weight, self.bias)
        room = self.tp.room((x.shape[0], self.out_features), x.dtype)
        total = self.tp.all_reduce(self.product(x, self.weight, None, room))
        return total if self.bias is None else total.add_(self.bias)

    def placements(self, prefix: str) -> Iterator[Placement]:
        """A range of columns of the weight, and the whole bias on every rank."""
        rows, columns = self.weight.shape
        yield Placement(
            name=f"{prefix}.{self.name}.weight",
            shape=(rows, self.full_in_features),
            region=((0, rows), (self.start, self.start + columns)),
            destination=self.weight,
        )
        if self.bias is not None:
            yield Placement(
                name=f"{prefix}.{self.name}.bias",
                shape=(rows,),
                region=((0, rows),),
                destination=self.bias,
            )
