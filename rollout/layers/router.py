"""Which experts a token goes to, and with which weights.

T tokens, E hidden size, X experts, k experts of a token, G groups of neighbouring experts.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from weight_sync.layout.weight_map import Placement

from .linear import project


class Router(nn.Module):
    """Scores of all experts and the choice among them; the same on every rank, which each hold all of it."""

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        *,
        top_k: int,
        sigmoid: bool,
        normalise: bool,
        scale: float,
        correction_bias: bool,
        num_groups: int,
        top_groups: int,
        float32: bool,
    ) -> None:
        """`float32`: logits are products in float32, of a copy of the weight that `refresh` makes."""
        super().__init__()
        self.top_k, self.sigmoid, self.normalise, self.scale = top_k, sigmoid, normalise, scale
        self.num_groups, self.top_groups, self.float32 = num_groups, top_groups, float32
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size), requires_grad=False)
        self.bias = (
            nn.Parameter(torch.empty(num_experts, dtype=torch.float32), requires_grad=False)
            if correction_bias
            else None
        )
        self._wide: torch.Tensor | None = None

    def keep_float32(self) -> None:
        """The bias is float32 whatever the model's dtype; called before parameters get their memory."""
        if self.bias is not None:
            bias = torch.empty_like(self.bias, dtype=torch.float32)
            self.bias = nn.Parameter(bias, requires_grad=False)

    @property
    def derives(self) -> bool:
        """Whether there is a copy in float32 beside the weight."""
        return self.float32 and self.weight.dtype != torch.float32

    def refresh(self) -> None:
        """Copy the weight, in place once there is a copy."""
        if self._wide is None:
            self._wide = torch.empty_like(self.weight, dtype=torch.float32)
        self._wide.copy_(self.weight)

    def is_fresh(self) -> torch.Tensor:
        """Whether the copy is the weight: bool, no dimensions."""
        assert self._wide is not None
        wide = self.weight.float()
        return (self._wide.view(torch.int32) == wide.view(torch.int32)).all()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x (T, E) -> weights (T, k) float32 and expert ids (T, k) int64, in the order of their scores."""
        if self.float32:
            wide = self._wide if self.derives and self._wide is not None else self.weight.float()
            logits = project(x.float(), wide, None)
        else:
            logits = project(x, self.weight, None)
        scores = logits.float().sigmoid() if self.sigmoid else logits.float().softmax(-1)
        choice = scores if self.bias is None else scores + self.bias
        if self.num_groups > 1:
            choice = self._within_groups(choice)
        ids = choice.topk(self.top_k, dim=-1).indices
        weights = scores.gather(1, ids)
        if self.normalise:
            total = weights.sum(-1, keepdim=True)
            weights = weights / (total + 1e-20 if self.sigmoid else total)
        if self.scale != 1.0:
            weights = weights * self.scale
        # Rounded as the reference rounds, where it computes logits in the model's dtype.
        return (weights if self.float32 else weights.to(x.dtype).float()), ids

    def _within_groups(self, choice: torch.Tensor) -> torch.Tensor:
        grouped = choice.unflatten(1, (self.num_groups, -1))
        best = grouped.topk(2, dim=-1).values.sum(-1)
        allowed = torch.zeros_like(best, dtype=torch.bool)
        allowed.scatter_(1, best.topk(self.top_groups, dim=-1).indices, True)
        return grouped.masked_fill(~allowed[..., None], float("-inf")).flatten(1)

    def placements(self, prefix: str) -> Iterator[Placement]:
        """All of both, on every rank."""
        yield Placement.whole(f"{prefix}.weight", self.weight.data)
        if self.bias is not None:
            yield Placement.whole(f"{prefix}.e_score_correction_bias", self.bias.data)
