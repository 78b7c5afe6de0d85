"""The feed-forward part of a decoder layer, chosen by the configuration: dense, or a mixture of experts.

T tokens, E hidden size, k experts of a token.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from rollout_kernels.expert_routing import Routing
from weight_sync.layout.fused import Fused
from weight_sync.layout.weight_map import Placement

from ..layers.experts import Experts
from ..layers.linear import ColumnParallelLinear, Product, RowParallelLinear, project
from ..layers.router import Router
from ..layers.shards import OutputRows, split_evenly
from ..layers.single_group import TensorParallelGroup, split_experts
from ..layers.step import LayerStep
from .model_config import ModelConfig
from .moe_config import MoeConfig

FusedNames = Iterator[tuple[str, Fused | tuple[str, ...]]]


def make_feed_forward(
    config: ModelConfig, layer: int, tp: TensorParallelGroup, ep_size: int
) -> FeedForward | MixtureOfExperts:
    """The feed-forward part of a layer. Both kinds map x (T, E) to (T, E), complete on every rank, and tell their parts
    of the checkpoint in memory order, the names that stand for several, and other names."""
    moe = config.moe
    if moe is not None and moe.layers[layer]:
        return MixtureOfExperts(config, moe, layer, tp, ep_size)
    return FeedForward(config.hidden_size, config.intermediate_size, bias=config.mlp_bias, tp=tp)


class FeedForward(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(
        self, hidden_size: int, width: int, *, bias: bool, tp: TensorParallelGroup
    ) -> None:
        super().__init__()
        start, self.size = split_evenly("intermediate_size", width, tp)
        self.gate_up = ColumnParallelLinear(
            "gate_up_proj",
            hidden_size,
            (
                OutputRows(name="gate_proj", full=width, start=start, size=self.size),
                OutputRows(name="up_proj", full=width, start=start, size=self.size),
            ),
            bias=bias,
        )
        self.down = RowParallelLinear("down_proj", width, hidden_size, bias=bias, tp=tp)

    def forward(self, x: torch.Tensor, step: LayerStep) -> torch.Tensor:
        """x (T, E) -> (T, E)."""
        return self.down(step.gate(self.gate_up(x)))

    def partial(self, x: torch.Tensor, step: LayerStep) -> torch.Tensor:
        """x (T, E) -> (T, E), this rank's summand, without a bias."""
        return self.down.product(step.gate(self.gate_up(x)), self.down.weight)

    def placements(self, prefix: str) -> Iterator[Placement]:
        """Parts of the checkpoint in memory order."""
        yield from self.gate_up.placements(prefix)
        yield from self.down.placements(prefix)

    def fused_names(self, prefix: str) -> FusedNames:
        """Gate and up as one."""
        yield from self.gate_up.fused_names(prefix)

    def aliases(self, prefix: str) -> Iterator[tuple[str, str]]:
        """None."""
        yield from ()


class MixtureOfExperts(nn.Module):
    """A few experts for each token, and in some families one for all; summed over the ranks once."""

    def __init__(
        self,
        config: ModelConfig,
        moe: MoeConfig,
        index: int,
        tp: TensorParallelGroup,
        ep_size: int,
    ) -> None:
        """`index`: the layer's."""
        super().__init__()
        self.product: Product = project
        """Of the shared expert's gate."""
        options, hidden_size = moe.router, config.hidden_size
        self.index, self.tp, self.family = index, tp, config.family
        self.counts: torch.Tensor | None = None
        """(X) int64: how often each expert was chosen, while somebody counts."""
        self.router = Router(
            hidden_size,
            options.num_experts,
            Routing(
                top_k=options.top_k,
                sigmoid=options.scores == "sigmoid",
                normalise=options.normalise,
                scale=options.scale,
                num_groups=options.num_groups,
                top_groups=options.top_groups,
                # As the reference rounds, where it computes logits in the model's dtype.
                rounded=not options.float32,
            ),
            correction_bias=options.correction_bias,
            float32=options.float32,
        )
        self.experts = Experts(
            options.num_experts, hidden_size, moe.intermediate_size, *split_experts(tp, ep_size)
        )
        self.shared_name = moe.shared_name
        self.shared = (
            FeedForward(hidden_size, moe.shared_size, bias=False, tp=tp)
            if moe.shared_size
            else None
        )
        self.shared_gate = (
            nn.Parameter(torch.empty(1, hidden_size), requires_grad=False)
            if moe.shared_gate
            else None
        )

    def forward(self, x: torch.Tensor, step: LayerStep) -> torch.Tensor:
        """x (T, E) -> (T, E)."""
        weights, ids = step.route(x, self.router, self.index)
        if self.counts is not None:
            chosen = ids.flatten()
            self.counts.scatter_add_(0, chosen, torch.ones_like(chosen))
        total = step.experts(x, weights, ids, self.experts)
        if self.shared is not None:
            every = self.shared.partial(x, step)
            if self.shared_gate is not None:
                every = every * self.product(x, self.shared_gate).sigmoid()
            total = total.add_(every)
        return total if self.tp.size == 1 else self.tp.all_reduce(total)

    def placements(self, prefix: str) -> Iterator[Placement]:
        """Parts of the checkpoint in memory order."""
        if self.shared_gate is not None:
            yield Placement.whole(f"{prefix}.{self.shared_name}_gate.weight", self.shared_gate.data)
        yield from self.router.placements(f"{prefix}.gate")
        yield from self.experts.placements(f"{prefix}.experts")
        if self.shared is not None:
            yield from self.shared.placements(f"{prefix}.{self.shared_name}")

    def fused_names(self, prefix: str) -> FusedNames:
        """The experts as transformers stacks them, and gate and up of the shared one."""
        yield from self.experts.fused_names(f"{prefix}.experts")
        if self.shared is not None:
            yield from self.shared.fused_names(f"{prefix}.{self.shared_name}")

    def aliases(self, prefix: str) -> Iterator[tuple[str, str]]:
        """Mixtral's checkpoints have names of their own for the same matrices."""
        if self.family != "mixtral":
            return
        other = f"{prefix.removesuffix('.mlp')}.block_sparse_moe"
        yield f"{other}.gate.weight", f"{prefix}.gate.weight"
        kinds = (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj"))
        for expert in range(self.experts.num_experts):
            for short, kind in kinds:
                yield (
                    f"{other}.experts.{expert}.{short}.weight",
                    f"{prefix}.experts.{expert}.{kind}.weight",
                )
