"""What a task gives to the loop: prompts, and a judgement of each completion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from .rollouts import Completion


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One prompt, with what it takes to judge its completions."""

    prompt_ids: tuple[int, ...]
    """Token ids of the prompt."""
    answer: str
    """The right completion, as text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """How good a completion is."""

    reward: float
    """What the policy is trained on."""
    passed: bool
    """Whether the answer is right; counted, not trained on."""


class Environment(Protocol):
    """A task."""

    def draw(self, count: int) -> Sequence[Problem]:
        """The next `count` training problems."""

    def score(self, problem: Problem, completion: Completion) -> Score:
        """Judge one completion of `problem`."""
