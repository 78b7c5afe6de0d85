"""The GRPO objective over padded batches of tokens.

Shapes: `B` sequences, `T` positions, `V` vocabulary. Three policies take part, each as the log-probability that it
gives to the sampled tokens:

* `behaviour`: the engine, which drew them, at the weight version that it served at that token;
* `proximal`: the trainer before the first optimiser step on this batch; PPO clips around it;
* `current`: the trainer now, the only one with a gradient.

    weight_t = min(proximal_t / behaviour_t, importance_cap)                        (importance correction, no gradient)
    ratio_t  = current_t / proximal_t
    loss     = mean over sampled tokens of
               -weight_t * min(ratio_t * A, clip(ratio_t, 1 - clip_low, 1 + clip_high) * A) + kl_coef * kl_t
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


def token_logprobs(
    logits: torch.Tensor, targets: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of `targets` (B, T) and the entropies of their distributions, from `logits` (B, T, V).

    The engine's rule: `log_softmax(logits / temperature)` over the whole vocabulary in float32, so the two compare.
    """
    table = torch.log_softmax(logits.float() / temperature, dim=-1)
    entropy = -(table.exp() * table).sum(dim=-1)
    return table.gather(-1, targets.unsqueeze(-1)).squeeze(-1), entropy


def masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of `values` where `mask` is true; every token counts the same, however long its completion is."""
    return (values * mask).sum() / mask.sum().clamp_min(1)


def kl_to_reference(current: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Per-token KL(current || reference) estimated from the sampled token alone (k3: never negative, low variance)."""
    log_ratio = reference - current
    return log_ratio.exp() - log_ratio - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class LossParts:
    """The loss of one minibatch and what went into it; means are over sampled tokens."""

    loss: torch.Tensor
    """Scalar to minimise."""
    clip_fraction: float
    """Share of tokens whose ratio was cut by the clipping."""
    truncated_fraction: float
    """Share of tokens whose importance weight was cut at the cap."""
    importance_mean: float
    """Mean importance weight after the cut; 1 when the engine sampled from the trainer's own policy."""
    kl: float
    """Mean KL to the reference policy; 0 without a reference."""


def policy_loss(
    *,
    current: torch.Tensor,
    proximal: torch.Tensor,
    behaviour: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    reference: torch.Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    importance_cap: float = 2.0,
    kl_coef: float = 0.0,
) -> LossParts:
    """The objective at the top of this file; all tensors are (B, T); `advantages` may be (B,), one for all tokens."""
    weight = (proximal - behaviour).exp().masked_fill(~mask, 1.0)
    capped = weight.clamp_max(importance_cap).detach()
    ratio = (current - proximal.detach()).masked_fill(~mask, 0.0).exp()
    advantage = advantages if advantages.dim() == 2 else advantages.unsqueeze(1)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    gain = torch.minimum(ratio * advantage, clipped * advantage)
    loss = -masked_mean(capped * gain, mask)
    kl = current.new_zeros(())
    if reference is not None:
        kl = masked_mean(kl_to_reference(current, reference).masked_fill(~mask, 0.0), mask)
        loss = loss + kl_coef * kl
    was_clipped = clipped * advantage < ratio * advantage
    return LossParts(
        loss=loss,
        clip_fraction=masked_mean(was_clipped.float(), mask).item(),
        truncated_fraction=masked_mean((weight > importance_cap).float(), mask).item(),
        importance_mean=masked_mean(capped, mask).item(),
        kl=kl.item(),
    )
