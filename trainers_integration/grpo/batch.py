"""Completions as one padded batch of tensors.

Shapes: `B` sequences, `T` predicted positions (longest prompt + completion, minus one).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from ..replay import padded_routes
from .rollouts import Completion


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainBatch:
    """Right-padded sequences: causal attention alone keeps padding out, so no attention mask is needed."""

    inputs: torch.Tensor
    """(B, T) token ids that the model reads."""
    targets: torch.Tensor
    """(B, T) the token that follows each input."""
    mask: torch.Tensor
    """(B, T) true where the target was sampled: not prompt, not padding."""
    behaviour: torch.Tensor
    """(B, T) the engine's log-probability of the target; 0 outside the mask."""
    advantages: torch.Tensor
    """(B,) one per completion."""
    own: torch.Tensor
    """(B,) true where the trainer's present version sampled the whole completion."""
    routes: torch.Tensor | None = None
    """(B, T, layers, k) int16: experts that the engine sent each input to, -1: padding; None: the model chooses."""

    @property
    def num_sequences(self) -> int:
        return self.inputs.shape[0]

    def select(self, rows: torch.Tensor) -> TrainBatch:
        """The sequences `rows`, as a batch of their own."""
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        return TrainBatch(**{name: p[rows] for name, p in parts.items() if p is not None})


def make_batch(
    completions: Sequence[Completion], advantages: torch.Tensor, version: int | None = None
) -> TrainBatch:
    """One batch from completions and their advantages, in the same order.

    version: the trainer's present one; None: no engine has it.
    """
    lengths = [len(c.prompt_ids) + len(c.output_ids) for c in completions]
    shape = (len(completions), max(lengths))
    ids = torch.zeros(shape, dtype=torch.int64)
    mask = torch.zeros(shape, dtype=torch.bool)
    behaviour = torch.zeros(shape, dtype=torch.float32)
    for row, (completion, end) in enumerate(zip(completions, lengths, strict=True)):
        start = len(completion.prompt_ids)
        ids[row, :end] = torch.tensor(completion.prompt_ids + completion.output_ids)
        mask[row, start:end] = True
        behaviour[row, start:end] = torch.tensor(completion.logprobs)
    routes = [c.routes for c in completions if c.routes is not None]
    return TrainBatch(
        inputs=ids[:, :-1],
        targets=ids[:, 1:],
        mask=mask[:, 1:],
        behaviour=behaviour[:, 1:],
        advantages=advantages.float(),
        own=torch.tensor([{span.version for span in c.spans} == {version} for c in completions]),
        routes=padded_routes(routes, shape[1] - 1) if routes else None,
    )
