"""What the loop tells about itself, one record per step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .learner import LearnStats
from .rollouts import Completion


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncRecord:
    """One weight update as the trainer saw it."""

    version: int
    """The version that the engine serves since."""
    started_at: float
    """Unix time when the trainer began to send."""
    committed_at: float
    """Unix time of the commit."""
    sync_s: float
    """The whole call: pack, stage, commit, verify."""
    pause_s: float
    """How long generation stood still for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """One step: a batch was sampled, scored and learned from."""

    step: int
    """Number of the step, from 1."""
    reward: float
    """Mean reward of the batch."""
    pass_rate: float
    """Share of completions that are right."""
    num_tokens: int
    """Sampled tokens."""
    mixed_fraction: float
    """Share of completions that were sampled by more than one weight version."""
    staleness: float
    """Mean number of versions between the one that sampled a token and the trainer's own when it learned from it."""
    generate_s: float
    """From sending the prompts to the last completion."""
    learn_s: float
    """All optimiser steps of the batch."""
    step_s: float
    """The whole step, by the clock on the wall."""
    num_dropped: int
    """Groups that were left out because they were too old; of a continuous run alone."""
    learn: LearnStats
    """What the optimiser saw."""
    syncs: tuple[SyncRecord, ...]
    """The weight updates in the course of the step; none in a run that never syncs."""
    completions: tuple[Completion, ...]
    """The batch itself."""

    @property
    def tokens_per_s(self) -> float:
        """Sampled tokens per second of the whole step: what a user of the loop gets."""
        return self.num_tokens / self.step_s

    def as_row(self) -> dict[str, Any]:
        """A line of JSON: plain numbers, and `syncs` as a list of objects."""
        row = {
            name: getattr(self, name)
            for name in self.__slots__
            if name not in ("learn", "syncs", "completions")
        }
        row["tokens_per_s"] = self.tokens_per_s
        return row | asdict(self.learn) | {"syncs": [asdict(sync) for sync in self.syncs]}


def mixed_fraction(completions: Sequence[Completion]) -> float:
    """Share of completions that were sampled by more than one weight version."""
    return sum(len(c.spans) > 1 for c in completions) / len(completions)


def mean_staleness(completions: Sequence[Completion], version: int) -> float:
    """Mean over tokens of `version` minus the version that sampled the token."""
    spans = [span for c in completions for span in c.spans]
    tokens = sum(span.end - span.start for span in spans)
    return sum((version - s.version) * (s.end - s.start) for s in spans) / max(1, tokens)
