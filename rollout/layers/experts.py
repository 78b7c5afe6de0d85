"""The routed experts of a layer: their matrices, stacked, and the products over tokens sorted by expert.

T tokens, E hidden size, X experts of this rank, k experts of a token, I width of an expert on this rank.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.functional import silu

from weight_sync.layout.fused import Fused
from weight_sync.layout.weight_map import Placement

from .linear import project
from .shards import split_evenly
from .single_group import RankOfMany


class Experts(nn.Module):
    """Whole experts of an expert-parallel rank, each split over the ranks that share it.

    A name for each matrix of each expert, as checkpoints have them, also of those on other ranks; and, as transformers
    holds them in memory, two names for all of a layer.
    """

    def __init__(
        self, num_experts: int, hidden_size: int, width: int, ep: RankOfMany, shared_by: RankOfMany
    ) -> None:
        super().__init__()
        self.num_experts, self.width = num_experts, width
        self.first, self.count = split_evenly("the number of experts (ep_size)", num_experts, ep)
        self.start, self.size = split_evenly("moe_intermediate_size", width, shared_by)
        self.gate_up = nn.Parameter(
            torch.empty(self.count, 2 * self.size, hidden_size), requires_grad=False
        )
        self.down = nn.Parameter(
            torch.empty(self.count, hidden_size, self.size), requires_grad=False
        )

    def placements(self, prefix: str) -> Iterator[Placement]:
        """Gate and up of every expert, then down of every expert: the order in which they lie in memory."""
        hidden = self.gate_up.shape[2]
        mine = (self.start, self.start + self.size)
        for expert in range(self.num_experts):
            here = self._local(expert)
            for half, kind in enumerate(("gate_proj", "up_proj")):
                rows = slice(half * self.size, (half + 1) * self.size)
                yield self._placement(
                    f"{prefix}.{expert}.{kind}.weight",
                    (self.width, hidden),
                    (mine, (0, hidden)),
                    None if here is None else self.gate_up.data[here, rows],
                )
        for expert in range(self.num_experts):
            here = self._local(expert)
            yield self._placement(
                f"{prefix}.{expert}.down_proj.weight",
                (hidden, self.width),
                ((0, hidden), mine),
                None if here is None else self.down.data[here],
            )

    def _local(self, expert: int) -> int | None:
        index = expert - self.first
        return index if 0 <= index < self.count else None

    def _placement(
        self,
        name: str,
        shape: tuple[int, int],
        region: tuple[tuple[int, int], tuple[int, int]],
        destination: torch.Tensor | None,
    ) -> Placement:
        if destination is None:
            region, destination = ((0, 0), (0, 0)), self.down.data.new_empty(0, 0)
        return Placement(name=name, shape=shape, region=region, destination=destination)

    def fused_names(self, prefix: str) -> Iterator[tuple[str, Fused]]:
        """`gate_up_proj` (X, 2 I, E) and `down_proj` (X, E, I) of all experts."""
        hidden, both = self.gate_up.shape[2], []
        for expert in range(self.num_experts):
            names = (f"{prefix}.{expert}.{kind}.weight" for kind in ("gate_proj", "up_proj"))
            both.append(Fused.joined(dict.fromkeys(names, (self.width, hidden))))
        yield f"{prefix}.gate_up_proj", Fused.stacked(both)
        downs = [
            Fused.joined({f"{prefix}.{expert}.down_proj.weight": (hidden, self.width)})
            for expert in range(self.num_experts)
        ]
        yield f"{prefix}.down_proj", Fused.stacked(downs)


def run_experts(
    x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, experts: Experts
) -> torch.Tensor:
    """x (T, E), weights (T, k) float32, ids (T, k) of all ranks' experts -> what this rank's add to each token, (T, E).

    One product for each matrix of each expert that a token goes to, over its tokens; a token's experts are added in the
    order of `ids`, whoever else is in the batch.
    """
    num_tokens, top_k = ids.shape
    order = ids.flatten().argsort(stable=True)
    bounds = torch.bincount(ids.flatten(), minlength=experts.num_experts).cumsum(0).tolist()
    rows = x[order // top_k]
    outputs = x.new_zeros(rows.shape)
    for index in range(experts.count):
        expert = experts.first + index
        first, end = (bounds[expert - 1] if expert else 0), bounds[expert]
        if first < end:
            gate, up = project(rows[first:end], experts.gate_up[index], None).chunk(2, -1)
            inner = silu(gate, inplace=True).mul_(up)
            outputs[first:end] = project(inner, experts.down[index], None)
    each = torch.empty_like(outputs)
    each[order] = outputs
    each = each.view(num_tokens, top_k, -1)
    total = each[:, 0] * weights[:, :1]
    for k in range(1, top_k):
        total = torch.addcmul(total, each[:, k], weights[:, k : k + 1])
    return total.to(x.dtype)
