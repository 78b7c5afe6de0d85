"""The task: sort digits. A model learns it in a minute, and an answer is simply right or wrong."""

from __future__ import annotations

import random
from collections.abc import Sequence

from rollout.errors import ConfigError

#: Ends a prompt: what follows is the answer.
SEPARATOR = "="


def make_prompt(digits: Sequence[int]) -> str:
    """`[3, 1, 2]` -> `"312="`."""
    return "".join(map(str, digits)) + SEPARATOR


def make_answer(digits: Sequence[int]) -> str:
    """`[3, 1, 2]` -> `"123"`."""
    return "".join(map(str, sorted(digits)))


def draw_pairs(count: int, *, num_digits: int, rng: random.Random) -> list[tuple[str, str]]:
    """`count` different (prompt, answer) pairs, drawn uniformly."""
    if count > 10**num_digits:
        raise ConfigError(
            f"cannot draw {count} different prompts of {num_digits} digits: expected at most {10**num_digits}; "
            "ask for fewer prompts or for more digits"
        )
    rows = [
        [int(digit) for digit in str(number).zfill(num_digits)]
        for number in rng.sample(range(10**num_digits), count)
    ]
    return [(make_prompt(row), make_answer(row)) for row in rows]


def reward(text: str, answer: str, *, ended: bool, partial_credit: float) -> float:
    """1 for the exact answer that also ended there; less for a good beginning.

    Any other completion gets `partial_credit` times the share of leading characters that are right, where the end
    counts as one more character. With `partial_credit` 0 this is exact match alone.
    """
    if ended and text == answer:
        return 1.0
    right = 0
    for got, expected in zip(text, answer, strict=False):
        if got != expected:
            break
        right += 1
    return partial_credit * right / (len(answer) + 1)
