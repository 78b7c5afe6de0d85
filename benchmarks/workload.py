"""Prompts and output lengths of `rollout bench generate`, the same for everyone who is measured."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .settings import GenerateBench


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One sample to generate."""

    prompt: list[int]
    """Token ids."""
    num_new: int
    """Output tokens, exactly."""


def make_jobs(settings: GenerateBench) -> list[Job]:
    """All samples: first one of each prompt, then the second one of each, and so on."""
    rng = random.Random(settings.seed)
    prompts = [
        [rng.randrange(settings.model.vocab_size) for _ in range(length)]
        for length in (
            rng.randint(settings.min_prompt_tokens, settings.max_prompt_tokens)
            for _ in range(settings.prompts)
        )
    ]
    return [
        Job(prompt=prompt, num_new=_geometric(rng, settings))
        for _ in range(settings.samples)
        for prompt in prompts
    ]


def _geometric(rng: random.Random, settings: GenerateBench) -> int:
    """At least 1; the probability of each further token is the same."""
    goes_on = math.log1p(-1.0 / settings.mean_new_tokens)
    length = 1 + int(math.log1p(-rng.random()) / goes_on)
    return min(length, settings.max_new_tokens)


def representative(jobs: Sequence[Job], num: int) -> list[Job]:
    """`num` jobs whose output lengths are evenly spread quantiles of all, so that a batch has a typical longest one."""
    ordered = sorted(jobs, key=lambda job: job.num_new)
    return [ordered[int((i + 0.5) * len(ordered) / num)] for i in range(min(num, len(ordered)))]


def sampling(settings: GenerateBench, job: Job) -> dict[str, Any]:
    """How the engine is asked for it."""
    return {
        "max_new_tokens": job.num_new,
        "ignore_eos": True,
        "temperature": settings.temperature,
    }
