"""The demo's task as the loop wants it: problems from the data set, rewards from the tokenizer's text."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from rollout.errors import ConfigError

from ..grpo.environment import Problem, Score
from ..grpo.rollouts import Completion
from .data import Example
from .task import SEPARATOR, reward


class SortingEnvironment:
    """Draws training examples in a seeded order, every example once before any comes again."""

    def __init__(
        self,
        examples: Sequence[Example],
        tokenizer: Any,
        *,
        max_new_tokens: int,
        partial_credit: float,
        seed: int,
    ) -> None:
        self._tokenizer = tokenizer
        self._max_new_tokens = max_new_tokens
        self._partial_credit = partial_credit
        self._rng = random.Random(seed)
        self._problems = {
            split: [self._problem(e) for e in examples if e.split == split]
            for split in ("train", "heldout")
        }
        self._queue: list[Problem] = []

    @property
    def training(self) -> Sequence[Problem]:
        """Problems that `draw` gives out."""
        return self._problems["train"]

    @property
    def heldout(self) -> Sequence[Problem]:
        """Problems that `draw` never gives out."""
        return self._problems["heldout"]

    def draw(self, count: int) -> Sequence[Problem]:
        """The next `count` training problems."""
        while len(self._queue) < count:
            again = list(self._problems["train"])
            self._rng.shuffle(again)
            self._queue += again
        drawn, self._queue = self._queue[:count], self._queue[count:]
        return drawn

    def score(self, problem: Problem, completion: Completion) -> Score:
        """Right means: exactly the answer, and then the end of the sequence."""
        ids = completion.output_ids
        ended = bool(ids) and ids[-1] == self._tokenizer.eos_token_id
        text = self._tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=False)
        value = reward(text, problem.answer, ended=ended, partial_credit=self._partial_credit)
        return Score(reward=value, passed=ended and text == problem.answer)

    def _problem(self, example: Example) -> Problem:
        known = self._tokenizer.get_vocab()
        unknown = sorted(set(example.prompt + example.answer) - known.keys())
        if unknown:
            raise ConfigError(
                f"prompt {example.prompt!r} cannot be used: got the characters {unknown}, expected digits and "
                f"{SEPARATOR!r}; correct the data set"
            )
        if len(example.answer) >= self._max_new_tokens:
            raise ConfigError(
                f"prompt {example.prompt!r} cannot be solved: its answer has {len(example.answer)} characters, "
                f"expected at most {self._max_new_tokens - 1}; raise grpo.max_new_tokens"
            )
        ids = tuple(self._tokenizer.encode(example.prompt))
        return Problem(prompt_ids=ids, answer=example.answer)
