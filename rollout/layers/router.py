"""Which experts a token goes to, and with which weights.

T tokens, E hidden size, X experts, k experts of a token, G groups of neighbouring experts.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from rollout_kernels.expert_routing import Routing
from weight_sync.layout.weight_map import Placement

from .linear import Product, project


class Router(nn.Module):
    """Scores of all experts and the choice among them; the same on every rank, which each hold all of it."""

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        routing: Routing,
        *,
        correction_bias: bool,
        float32: bool,
    ) -> None:
        """`float32`: logits are products in float32, and so is the weight, whatever the model's dtype: as the trainer's
        model holds it."""
        super().__init__()
        self.product: Product = project
        self.routing, self.float32 = routing, float32
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size), requires_grad=False)
        self.bias = (
            nn.Parameter(torch.empty(num_experts, dtype=torch.float32), requires_grad=False)
            if correction_bias
            else None
        )

    def keep_float32(self) -> None:
        """Take back what a cast of the whole model has done to the bias, and to the weight of a router in float32;
        called before parameters get their memory."""
        if self.float32:
            weight = torch.empty_like(self.weight, dtype=torch.float32)
            self.weight = nn.Parameter(weight, requires_grad=False)
        if self.bias is not None:
            bias = torch.empty_like(self.bias, dtype=torch.float32)
            self.bias = nn.Parameter(bias, requires_grad=False)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """x (T, E) -> (T, X), float32 or x's dtype."""
        return self.product(x.float() if self.float32 else x, self.weight)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x (T, E) -> weights (T, k) float32 and expert ids (T, k) int64, in the order of their scores."""
        logits = self.logits(x)
        routing = self.routing
        scores = logits.float().sigmoid() if routing.sigmoid else logits.float().softmax(-1)
        choice = scores if self.bias is None else scores + self.bias
        if routing.num_groups > 1:
            choice = self._within_groups(choice)
        ids = choice.topk(routing.top_k, dim=-1).indices
        weights = scores.gather(1, ids)
        if routing.normalise:
            total = weights.sum(-1, keepdim=True)
            weights = weights / (total + 1e-20 if routing.sigmoid else total)
        if routing.scale != 1.0:
            weights = weights * routing.scale
        return (weights.to(logits.dtype).float() if routing.rounded else weights), ids

    def _within_groups(self, choice: torch.Tensor) -> torch.Tensor:
        routing = self.routing
        grouped = choice.unflatten(1, (routing.num_groups, -1))
        best = grouped.topk(2, dim=-1).values.sum(-1)
        allowed = torch.zeros_like(best, dtype=torch.bool)
        allowed.scatter_(1, best.topk(routing.top_groups, dim=-1).indices, True)
        return grouped.masked_fill(~allowed[..., None], float("-inf")).flatten(1)

    def placements(self, prefix: str) -> Iterator[Placement]:
        """All of both, on every rank."""
        yield Placement.whole(f"{prefix}.weight", self.weight.data)
        if self.bias is not None:
            yield Placement.whole(f"{prefix}.e_score_correction_bias", self.bias.data)
