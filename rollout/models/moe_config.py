"""The options in which mixture-of-experts families differ, read from a configuration of transformers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from transformers import PretrainedConfig

MOE_FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "glm4_moe")


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig:
    """How a token's experts are chosen and weighted."""

    num_experts: int
    """Routed experts of a layer."""
    top_k: int
    """Experts that a token goes to."""
    scores: Literal["softmax", "sigmoid"] = "softmax"
    """Function of the router's logits, in float32."""
    normalise: bool = False
    """Divide the chosen scores by their sum."""
    scale: float = 1.0
    """Factor of the weights."""
    correction_bias: bool = False
    """A bias in float32 is added to the scores for the choice, and not to the weights."""
    num_groups: int = 1
    """Groups of neighbouring experts."""
    top_groups: int = 1
    """Groups that may be chosen from: those whose two best experts score most."""
    float32: bool = False
    """Logits are computed in float32, and the weight is held in it, whatever the model's dtype."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeConfig:
    """A mixture of experts, as the feed-forward part of some of a decoder's layers."""

    router: RouterConfig
    """Its router."""
    intermediate_size: int
    """Width of a routed expert."""
    shared_size: int = 0
    """Width of the expert that sees every token; 0: there is none."""
    shared_name: str = "shared_experts"
    """Its name in the checkpoint."""
    shared_gate: bool = False
    """Its output is multiplied by the sigmoid of a projection of the input."""
    layers: tuple[bool, ...]
    """For each layer of the decoder whether it has experts; the others are dense."""

    @property
    def num_layers(self) -> int:
        """Layers with experts."""
        return sum(self.layers)

    def num_parameters(self, hidden_size: int) -> int:
        """Elements of all weights of a layer's mixture."""
        widths = self.router.num_experts * self.intermediate_size + self.shared_size
        gates = self.router.num_experts + (1 if self.shared_gate else 0)
        return hidden_size * (3 * widths + gates)


def moe_config(config: PretrainedConfig, problems: list[str]) -> MoeConfig | None:
    """The mixture of a configuration, None for a dense family; adds what is not supported to `problems`."""
    family, num_layers = config.model_type, config.num_hidden_layers
    if family not in MOE_FAMILIES:
        return None
    options: Any = config
    if family == "mixtral":
        router = RouterConfig(
            num_experts=options.num_local_experts, top_k=options.num_experts_per_tok, normalise=True
        )
        moe = MoeConfig(
            router=router, intermediate_size=options.intermediate_size, layers=(True,) * num_layers
        )
    elif family == "glm4_moe":
        router = RouterConfig(
            num_experts=options.n_routed_experts,
            top_k=options.num_experts_per_tok,
            scores="sigmoid",
            normalise=bool(options.norm_topk_prob),
            scale=float(options.routed_scaling_factor),
            correction_bias=True,
            num_groups=options.n_group,
            top_groups=options.topk_group,
            float32=True,
        )
        moe = MoeConfig(
            router=router,
            intermediate_size=options.moe_intermediate_size,
            shared_size=options.moe_intermediate_size * options.n_shared_experts,
            layers=tuple(layer >= options.first_k_dense_replace for layer in range(num_layers)),
        )
    else:
        dense, step = options.mlp_only_layers or (), options.decoder_sparse_step
        shared = options.shared_expert_intermediate_size if family == "qwen2_moe" else 0
        router = RouterConfig(
            num_experts=options.num_experts,
            top_k=options.num_experts_per_tok,
            normalise=bool(options.norm_topk_prob),
        )
        moe = MoeConfig(
            router=router,
            intermediate_size=options.moe_intermediate_size,
            shared_size=shared,
            shared_name="shared_expert",
            shared_gate=shared > 0,
            layers=tuple(
                layer not in dense and router.num_experts > 0 and (layer + 1) % step == 0
                for layer in range(num_layers)
            ),
        )
    problems += _router_problems(router)
    return moe if any(moe.layers) else None


def _router_problems(router: RouterConfig) -> list[str]:
    problems = []
    if not 0 < router.top_k <= router.num_experts:
        problems.append(f"{router.top_k} of {router.num_experts} experts for each token")
    groups = router.num_groups
    if groups < 1 or router.num_experts % groups or not 0 < router.top_groups <= groups:
        problems.append(
            f"{router.top_groups} of {groups} groups of {router.num_experts} experts, which do not divide"
        )
    elif groups > 1 and router.num_experts // groups < 2:
        problems.append(f"{groups} groups of one expert each")
    elif router.top_k > router.top_groups * (router.num_experts // groups):
        problems.append(
            f"{router.top_k} experts out of {router.top_groups} groups, which are fewer"
        )
    return problems
