"""The trainer's half of a step: from a batch of completions to new weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..replay import replayed_experts
from .batch import TrainBatch
from .config import GrpoConfig
from .losses import LossParts, masked_mean, policy_loss, token_logprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnStats:
    """What one batch did to the policy; means over its optimiser steps where there are several."""

    loss: float
    """Value of the objective."""
    entropy: float
    """Mean entropy of the policy at sampled tokens before the update, nats."""
    clip_fraction: float
    """Share of tokens that PPO clipped."""
    truncated_fraction: float
    """Share of tokens whose importance weight met the cap."""
    importance_mean: float
    """Mean importance weight; 1 when the engine sampled from the trainer's own policy."""
    kl: float
    """KL to the reference policy; 0 without one."""
    grad_norm: float
    """Gradient norm before it was scaled down."""
    learning_rate: float
    """Learning rate of this batch."""
    logprob_gap_max: float
    """Largest |trainer - engine| log-probability over sampled tokens, before the update."""
    logprob_gap_mean: float
    """Mean of the same."""
    logprob_gap_own_max: float | None
    """The largest over completions that the trainer's own version sampled whole; None: there is none."""


class Learner:
    """A policy with its optimiser. It knows nothing of engines: batches go in, `model` changes in place."""

    def __init__(self, model: Any, config: GrpoConfig, *, seed: int = 0) -> None:
        self.model = model.train()
        self.config = config
        self._reference = copy.deepcopy(model).eval() if config.kl_coef > 0 else None
        self._optimizer = torch.optim.AdamW(
            model.parameters(), lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0
        )
        self._order = torch.Generator().manual_seed(seed)
        self._num_batches = 0

    def learn(
        self, batch: TrainBatch, after_update: Callable[[], None] | None = None
    ) -> LearnStats:
        """All optimiser steps of one batch; `after_update` is called after each of them."""
        rate = self._set_learning_rate()
        proximal, entropy, reference = self._score(batch)
        updates = []
        for rows in self._minibatches(batch.num_sequences):
            part_of_reference = None if reference is None else reference[rows]
            updates.append(self._update(batch.select(rows), proximal[rows], part_of_reference))
            if after_update is not None:
                after_update()
        self._num_batches += 1
        return self._stats(batch, updates, proximal=proximal, entropy=entropy, rate=rate)

    def _score(self, batch: TrainBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Before the first update: the policy's log-probabilities and entropies, and the reference's, each (B, T)."""
        with torch.no_grad():
            proximal, entropy = self._logprobs(self.model, batch)
            if self._reference is None:
                return proximal, entropy, None
            return proximal, entropy, self._logprobs(self._reference, batch)[0]

    def _stats(
        self,
        batch: TrainBatch,
        updates: Sequence[tuple[LossParts, float]],
        *,
        proximal: torch.Tensor,
        entropy: torch.Tensor,
        rate: float,
    ) -> LearnStats:
        gap = (proximal - batch.behaviour).abs().masked_fill(~batch.mask, 0.0)
        parts = [part for part, _ in updates]
        return LearnStats(
            loss=_mean([part.loss.item() for part in parts]),
            entropy=masked_mean(entropy, batch.mask).item(),
            clip_fraction=_mean([part.clip_fraction for part in parts]),
            truncated_fraction=_mean([part.truncated_fraction for part in parts]),
            importance_mean=_mean([part.importance_mean for part in parts]),
            kl=_mean([part.kl for part in parts]),
            grad_norm=_mean([norm for _, norm in updates]),
            learning_rate=rate,
            logprob_gap_max=gap.max().item(),
            logprob_gap_mean=masked_mean(gap, batch.mask).item(),
            logprob_gap_own_max=gap[batch.own].max().item() if batch.own.any() else None,
        )

    def _update(
        self, batch: TrainBatch, proximal: torch.Tensor, reference: torch.Tensor | None
    ) -> tuple[LossParts, float]:
        """One optimiser step; returns the parts of the loss and the gradient's norm."""
        config = self.config
        current, _ = self._logprobs(self.model, batch)
        parts = policy_loss(
            current=current,
            proximal=proximal,
            behaviour=batch.behaviour,
            advantages=batch.advantages,
            mask=batch.mask,
            reference=reference,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            importance_cap=config.importance_cap,
            kl_coef=config.kl_coef,
        )
        return parts, self._step(self._optimizer, self.model, parts.loss)

    def _step(
        self, optimizer: torch.optim.Optimizer, model: nn.Module, loss: torch.Tensor
    ) -> float:
        """Follow the gradient of `loss` once; returns its norm before it was scaled down."""
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), self.config.max_grad_norm)
        optimizer.step()
        return norm.item()

    def _logprobs(self, model: Any, batch: TrainBatch) -> tuple[torch.Tensor, torch.Tensor]:
        routes = batch.routes if model is self.model else None
        with nullcontext() if routes is None else replayed_experts(model, routes):
            logits = model(input_ids=batch.inputs, use_cache=False).logits
        return token_logprobs(logits, batch.targets, self.config.temperature)

    def _minibatches(self, num_sequences: int) -> Iterator[torch.Tensor]:
        for _ in range(self.config.epochs):
            order = torch.randperm(num_sequences, generator=self._order)
            yield from order.chunk(self.config.minibatches)

    def _set_learning_rate(self) -> float:
        """Linear warm-up, then linear decay to the final fraction."""
        config = self.config
        progress = min(1.0, self._num_batches / max(1, config.steps - 1))
        decay = 1 - (1 - config.lr_final_fraction) * progress
        warmup = min(1.0, (self._num_batches + 1) / max(1, config.lr_warmup_steps))
        rate = config.learning_rate * decay * warmup
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        return rate


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
