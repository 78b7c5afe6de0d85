"""PPO with a critic, in one file: what it adds to the loop and the learner of `grpo/`.

An engine draws the completions and gives what PPO needs of it: exact token ids, the log-probability of each by the
version that drew it (`behaviour`), which tokens are the policy's own (`mask`), and how each completion ended. The rest
is the trainer's:

    V_t      = critic(tokens before target t), 0 after the last one
    r_t      = outcome, at a completion's last token, - kl_coef * (log pi_t - log ref_t), at every token
    delta_t  = r_t + gamma * V_(t+1) - V_t
    A_t      = delta_t + gamma * lambda * A_(t+1)                      (generalised advantages, Schulman et al. 2016)
    return_t = A_t + V_t
    policy   : the clipped objective of `grpo/losses.py` with these A_t, whitened          (Schulman et al. 2017)
    critic   : mean of max((V - return)^2, (V clipped around its old value - return)^2) / 2

GRPO compares the completions of a prompt with each other, and needs several; here a completion is compared with what
the critic expected. A completion that a length limit cut is one that has ended.

Shapes: `B` sequences, `T` positions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from .grpo.batch import TrainBatch
from .grpo.config import GrpoConfig, PpoConfig
from .grpo.learner import Learner, LearnStats
from .grpo.loop import GrpoLoop
from .grpo.losses import masked_mean, policy_loss

_TINY = 1e-8


@dataclass(frozen=True, slots=True, kw_only=True)
class PpoStats(LearnStats):
    """What one batch did to the policy and to the critic."""

    value_loss: float
    """Mean over its optimiser steps."""
    explained_variance: float
    """Share of the returns' variance that the critic had foreseen; 1: all, 0: no more than their mean, or they
    do not vary."""


class Critic(nn.Module):
    """A policy's decoder with one number per position in place of a token's logits; it begins at 0 everywhere."""

    def __init__(self, policy: Any) -> None:
        super().__init__()
        self.decoder = copy.deepcopy(policy.get_decoder())
        self.head = nn.Linear(policy.config.hidden_size, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Values (B, T): what is expected to come after the inputs up to each position."""
        hidden = self.decoder(input_ids=inputs, use_cache=False).last_hidden_state
        values: torch.Tensor = self.head(hidden.float()).squeeze(-1)
        return values


def token_rewards(
    outcomes: torch.Tensor, mask: torch.Tensor, penalties: torch.Tensor | None = None
) -> torch.Tensor:
    """Rewards (B, T): `outcomes` (B,) at the last sampled token, less `penalties` (B, T) at every one."""
    after = torch.zeros_like(mask)
    after[:, :-1] = mask[:, 1:]
    rewards = torch.where(mask & ~after, outcomes.unsqueeze(1), 0.0)
    return rewards if penalties is None else rewards - penalties.masked_fill(~mask, 0.0)


def gae(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(advantages, returns), each (B, T) and 0 outside `mask`, from rewards and values of that shape.

    A completion's sampled tokens must follow one another.
    """
    advantages = torch.zeros_like(values)
    following = torch.zeros_like(values[:, 0])
    next_value = torch.zeros_like(values[:, 0])
    for t in range(values.shape[1] - 1, -1, -1):
        own = mask[:, t].to(values.dtype)
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        following = (delta + gamma * lam * following) * own
        next_value = values[:, t] * own
        advantages[:, t] = following
    return advantages, (advantages + values).masked_fill(~mask, 0.0)


def whitened(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`values` with mean 0 and standard deviation 1 over `mask`, 0 outside."""
    mean = masked_mean(values, mask)
    std = masked_mean((values - mean).square(), mask).sqrt()
    return ((values - mean) / (std + _TINY)).masked_fill(~mask, 0.0)


def value_loss(
    values: torch.Tensor,
    before: torch.Tensor,
    returns: torch.Tensor,
    mask: torch.Tensor,
    clip: float,
) -> torch.Tensor:
    """The critic's loss at the top of this file; all tensors are (B, T)."""
    clipped = before + (values - before).clamp(-clip, clip)
    worse = torch.maximum((values - returns).square(), (clipped - returns).square())
    return 0.5 * masked_mean(worse, mask)


class PpoLearner(Learner):
    """A policy and a critic with their optimisers; in place of advantages its batches carry the outcomes."""

    def __init__(
        self, model: Any, config: GrpoConfig, ppo: PpoConfig | None = None, *, seed: int = 0
    ) -> None:
        super().__init__(model, config, seed=seed)
        self.ppo = ppo or PpoConfig()
        self.critic = Critic(model)
        self._critic_optimizer = torch.optim.AdamW(
            self.critic.parameters(),
            lr=self.ppo.critic_learning_rate,
            betas=(0.9, 0.95),
            weight_decay=0.0,
        )

    def learn(self, batch: TrainBatch, after_update: Callable[[], None] | None = None) -> PpoStats:
        """All optimiser steps of one batch; `after_update` is called after each of them."""
        config, ppo, mask = self.config, self.ppo, batch.mask
        rate = self._set_learning_rate()
        for group in self._critic_optimizer.param_groups:
            group["lr"] = ppo.critic_learning_rate * rate / config.learning_rate
        proximal, entropy, reference = self._score(batch)
        with torch.no_grad():
            before = self.critic(batch.inputs)
        penalties = None if reference is None else config.kl_coef * (proximal - reference)
        rewards = token_rewards(batch.advantages, mask, penalties)
        advantages, returns = gae(rewards, before, mask, ppo.gamma, ppo.gae_lambda)
        foreseen = _explained(returns, before, mask)
        if ppo.whiten:
            advantages = whitened(advantages, mask)
        updates, losses = [], []
        for rows in self._minibatches(batch.num_sequences):
            part = batch.select(rows)
            current, _ = self._logprobs(self.model, part)
            parts = policy_loss(
                current=current,
                proximal=proximal[rows],
                behaviour=part.behaviour,
                advantages=advantages[rows],
                mask=part.mask,
                clip_low=config.clip_low,
                clip_high=config.clip_high,
                importance_cap=config.importance_cap,
            )
            updates.append((parts, self._step(self._optimizer, self.model, parts.loss)))
            values = self.critic(part.inputs)
            loss = value_loss(values, before[rows], returns[rows], part.mask, ppo.value_clip)
            self._step(self._critic_optimizer, self.critic, loss)
            losses.append(loss.item())
            if after_update is not None:
                after_update()
        self._num_batches += 1
        stats = self._stats(batch, updates, proximal=proximal, entropy=entropy, rate=rate)
        kl = 0.0 if reference is None else masked_mean(proximal - reference, mask).item()
        mean_loss = sum(losses) / len(losses)
        return PpoStats(
            **{**asdict(stats), "kl": kl}, value_loss=mean_loss, explained_variance=foreseen
        )


class PpoLoop(GrpoLoop):
    """The GRPO loop, whose learner turns outcomes into advantages itself."""

    def _advantages(self, rewards: torch.Tensor) -> torch.Tensor:
        return rewards


def _explained(returns: torch.Tensor, values: torch.Tensor, mask: torch.Tensor) -> float:
    varied = _variance(returns, mask).item()
    return 0.0 if varied < _TINY else 1 - _variance(returns - values, mask).item() / varied


def _variance(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return masked_mean((values - masked_mean(values, mask)).square(), mask)
