"""Root-mean-square norm, in float32 whatever the model's dtype, then cast and scaled in the model's dtype."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from weight_sync.layout.weight_map import Placement

from .workspace import Workspace


class RMSNorm(nn.Module):
    """y = weight * cast(x / sqrt(mean(x^2) + eps)) over the last dimension."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)

    def forward(self, x: torch.Tensor, out: torch.Tensor, workspace: Workspace) -> torch.Tensor:
        """x (..., size), of any strides -> out of the same shape; `out` may be `x` itself."""
        if x.dtype == torch.float32:
            scratch = workspace.take("norm", tuple(x.shape))
            scale = torch.mul(x, x, out=scratch).mean(-1, keepdim=True)
            torch.mul(x, scale.add_(self.eps).rsqrt_(), out=out)
            return out.mul_(self.weight)
        wide = x.to(torch.float32)
        scale = wide.pow(2).mean(-1, keepdim=True).add_(self.eps).rsqrt_()
        out.copy_(wide.mul_(scale))
        return out.mul_(self.weight)

    def placements(self, prefix: str) -> Iterator[Placement]:
        """The whole weight, on every rank."""
        size = self.weight.shape[0]
        yield Placement(
            name=f"{prefix}.weight",
            shape=(size,),
            region=((0, size),),
            destination=self.weight,
        )
