"""From prompts to completions: one call to the engine, and its results as typed records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


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
    """"stop", "length" or "abort"."""
    latency_s: float
    """From the request's arrival in the engine to its last token."""
    token_times: tuple[float, ...]
    """Unix time of each output token; empty unless asked for."""


def parse_completion(prompt_ids: Sequence[int], result: dict[str, Any]) -> Completion:
    """One result of `engine.generate(..., return_logprob=True)` as a `Completion`; checks that the lengths agree."""
    meta = result["meta_info"]
    output_ids = tuple(result["output_ids"])
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
            VersionSpan(version=int(s["version"]), start=s["start"], end=s["end"])
            for s in meta["weight_versions"]
        ),
        finish_reason=(meta.get("finish_reason") or {}).get("type", "abort"),
        latency_s=float(meta["e2e_latency"]),
        token_times=tuple(meta.get("token_times") or ()),
    )


def sample(
    engine: Any,
    prompts: Sequence[Sequence[int]],
    *,
    num_samples: int,
    max_new_tokens: int,
    temperature: float,
    token_times: bool = False,
) -> list[list[Completion]]:
    """`num_samples` completions of every prompt, grouped by prompt."""
    options = {"return_token_times": True} if token_times else {}
    results = engine.generate(
        input_ids=[list(ids) for ids in prompts],
        sampling_params={
            "n": num_samples,
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
        },
        return_logprob=True,
        **options,
    )
    return [
        [parse_completion(ids, r) for r in results[i * num_samples : (i + 1) * num_samples]]
        for i, ids in enumerate(prompts)
    ]
