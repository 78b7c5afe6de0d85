"""Settings of the GRPO loop, and what PPO has beside them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class GrpoConfig:
    """What one GRPO run does; a step is one batch of completions."""

    steps: int = 150
    """Batches that are sampled and learned from."""
    prompts_per_step: int = 64
    """Different prompts in a batch."""
    samples_per_prompt: int = 8
    """Completions of each prompt, at least 2: the group that advantages are computed in."""
    max_new_tokens: int = 8
    """Longest completion, tokens."""
    temperature: float = 1.0
    """Sampling temperature; log-probabilities are those of the tempered distribution on both sides."""
    prompts_in_flight: int = 4
    """Prompts that the asynchronous loop has in the engine at once; the later ones meet fresher weights. The continuous
    loop has so many beside those of the next batch."""
    max_staleness: int = 8
    """Versions that a group's oldest token may lie behind in the continuous loop; older groups are left out."""
    learning_rate: float = 2.5e-4
    """Peak learning rate of AdamW."""
    lr_warmup_steps: int = 5
    """Steps over which the learning rate rises from zero."""
    lr_final_fraction: float = 0.1
    """Share of the peak that the learning rate falls to, linearly, by the last step; 1: it stays."""
    minibatches: int = 4
    """Optimiser steps per pass over a batch."""
    epochs: int = 1
    """Passes over a batch."""
    clip_low: float = 0.2
    """PPO clipping: the ratio's lower bound is 1 - clip_low."""
    clip_high: float = 0.28
    """PPO clipping: the ratio's upper bound is 1 + clip_high."""
    importance_cap: float = 2.0
    """Largest weight trainer/engine that a token gets; it corrects stale and numerically different sampling."""
    kl_coef: float = 0.0
    """Weight of the KL to the policy that training starts from; 0: no reference policy is kept."""
    normalize_std: bool = True
    """Divide advantages by the group's standard deviation."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    replay_experts: bool = False
    """Of a mixture: the trainer sends each token to the experts that the engine sent it to. The engine has to keep them
    (`enable_return_routed_experts`)."""

    @property
    def sampling_params(self) -> dict[str, Any]:
        """As `engine.generate` takes them."""
        return {
            "n": self.samples_per_prompt,
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
        }

    def __post_init__(self) -> None:
        lowest = {
            "steps": 1,
            "prompts_per_step": 1,
            "prompts_in_flight": 1,
            "max_staleness": 0,
            "samples_per_prompt": 2,
            "max_new_tokens": 1,
            "minibatches": 1,
            "epochs": 1,
            "lr_warmup_steps": 0,
        }
        positive = ("temperature", "learning_rate", "importance_cap", "max_grad_norm")
        problems = [
            f"{name}: got {getattr(self, name)}, expected at least {least}"
            for name, least in lowest.items()
            if getattr(self, name) < least
        ] + [
            f"{name}: got {getattr(self, name)}, expected more than 0"
            for name in positive
            if not getattr(self, name) > 0
        ]
        if problems:
            raise ValueError("; ".join(problems))


@dataclass(frozen=True, kw_only=True)
class PpoConfig:
    """What PPO has beside the settings of the loop."""

    gamma: float = 1.0
    """Discount of a later reward, per token."""
    gae_lambda: float = 0.95
    """0: one step of reward and then the critic's word; 1: the whole outcome, and the critic as a baseline."""
    value_clip: float = 0.2
    """How far an update may move a value before it stops paying."""
    critic_learning_rate: float = 1e-3
    """Of AdamW; it follows the schedule of the policy's."""
    whiten: bool = True
    """Bring a batch's advantages to mean 0 and standard deviation 1."""

    def __post_init__(self) -> None:
        problems = [
            f"{name}: got {getattr(self, name)}, expected between 0 and 1"
            for name in ("gamma", "gae_lambda")
            if not 0 <= getattr(self, name) <= 1
        ] + [
            f"{name}: got {getattr(self, name)}, expected more than 0"
            for name in ("value_clip", "critic_learning_rate")
            if not getattr(self, name) > 0
        ]
        if problems:
            raise ValueError("; ".join(problems))
