"""From prompts to completions: one call to the engine, and its results as typed records."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rollout.errors import RolloutError


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionSpan:
    """Output tokens `start` to `end` (half open) were sampled by weight version `version`."""

    version: int
    start: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One sampled completion and everything that the engine says about it."""

    prompt_ids: tuple[int, ...]
    """The prompt as it was sent."""
    output_ids: tuple[int, ...]
    """Sampled tokens, end-of-sequence included when it was sampled."""
    logprobs: tuple[float, ...]
    """The engine's log-probability of each output token, by the version that sampled it."""
    spans: tuple[VersionSpan, ...]
    """Which weight version sampled which tokens."""
    finish_reason: str
    """"stop" or "length"."""
    latency_s: float
    """From the request's arrival in the engine to its last token."""
    token_times: tuple[float, ...]
    """Unix time of each output token."""
    routes: np.ndarray[Any, Any] | None = None
    """Experts of each token but the last in the engine, (tokens - 1, layers, k); None: they were not asked for."""


def parse_completion(prompt_ids: Sequence[int], result: dict[str, Any]) -> Completion:
    """One result of `engine.generate(..., return_logprob=True)` as a `Completion`; checks that the lengths agree.

    Raises `RolloutError` for one that was ended from outside: it is no sample of the policy's. `engine.resume` goes on
    with such results.
    """
    meta = result["meta_info"]
    output_ids = tuple(result["output_ids"])
    reason = meta["finish_reason"]
    if reason["type"] == "abort":
        raise RolloutError(
            f"a completion was ended after {len(output_ids)} tokens: {reason['message']}; leave the requests of a "
            "trainer alone, or hand the results to engine.resume first"
        )
    logprobs = tuple(entry[0] for entry in meta["output_token_logprobs"])
    if len(logprobs) != len(output_ids):
        raise ValueError(
            f"the engine's answer does not add up: got {len(logprobs)} log-probabilities for {len(output_ids)} "
            "tokens, expected one each; was the request sent with return_logprob=True?"
        )
    return Completion(
        prompt_ids=tuple(prompt_ids),
        output_ids=output_ids,
        logprobs=logprobs,
        spans=tuple(
            VersionSpan(version=s["number"], start=s["start"], end=s["end"])
            for s in meta["weight_versions"]
        ),
        finish_reason=reason["type"],
        latency_s=float(meta["e2e_latency"]),
        token_times=tuple(meta["token_times"]),
        routes=meta.get("routed_experts"),
    )


def sample(
    engine: Any,
    prompts: Sequence[Sequence[int]],
    sampling_params: dict[str, Any],
    *,
    routes: bool = False,
) -> list[list[Completion]]:
    """`sampling_params["n"]` completions of every prompt, grouped by prompt; all run at once.

    routes: with the experts of each token.
    """
    num_samples = sampling_params["n"]
    results = engine.generate(
        input_ids=[list(ids) for ids in prompts],
        sampling_params=sampling_params,
        return_logprob=True,
        return_token_times=True,
        return_routed_experts=routes,
    )
    return [
        [parse_completion(ids, r) for r in results[i * num_samples : (i + 1) * num_samples]]
        for i, ids in enumerate(prompts)
    ]


async def sample_in_flight(
    engine: Any,
    prompts: Sequence[Sequence[int]],
    sampling_params: dict[str, Any],
    *,
    prompts_in_flight: int,
    routes: bool = False,
) -> list[list[Completion]]:
    """As `sample`, with a call per prompt, of which `prompts_in_flight` run at once."""
    room = asyncio.Semaphore(prompts_in_flight)

    async def one(ids: Sequence[int]) -> list[Completion]:
        async with room:
            results = await engine.async_generate(
                input_ids=list(ids),
                sampling_params=sampling_params,
                return_logprob=True,
                return_token_times=True,
                return_routed_experts=routes,
            )
        return [parse_completion(ids, result) for result in results]

    return await asyncio.gather(*(one(ids) for ids in prompts))
