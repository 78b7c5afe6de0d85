"""Completions for prompts that TRL repeats, and the checks that TRL does not make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rollout.errors import InvalidRequestError, RolloutError


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """One completion for each prompt of a batch, in its order."""

    completion_ids: list[list[int]]
    """Sampled tokens, the end token included where it was drawn; never empty."""
    logprobs: list[list[float]]
    """Of each sampled token, by the version that drew it: `log_softmax(logits / temperature)` over the vocabulary."""


def sampling_options(settings: Any, stop_token_ids: Sequence[int]) -> dict[str, Any]:
    """What `settings`, a trainer or its configuration, ask of the engine for one completion."""
    return {
        "max_new_tokens": settings.max_completion_length,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "top_k": settings.top_k or -1,
        "min_p": settings.min_p or 0.0,
        "repetition_penalty": settings.repetition_penalty,
        "stop_token_ids": list(stop_token_ids),
    }


def sampling_params(trainer: Any) -> dict[str, Any]:
    """The same for a `GRPOTrainer` or `RLOOTrainer`; `generation_kwargs` of its settings go before all else."""
    extra = dict(getattr(trainer.args, "generation_kwargs", None) or {})
    if "n" in extra:
        raise InvalidRequestError(
            "generation_kwargs: got 'n', expected none: num_generations says it; leave it out"
        )
    return sampling_options(trainer, trainer.eos_token_ids) | extra


def token_ids(tokenizer: Any, prompts: Sequence[Any], **template: Any) -> list[list[int]]:
    """Token ids of prompts as TRL makes them: a chat template for messages, the plain tokenizer for text."""
    if isinstance(prompts[0], str):
        return [list(ids) for ids in tokenizer(text=list(prompts))["input_ids"]]
    rendered = tokenizer.apply_chat_template(
        list(prompts), add_generation_prompt=True, tokenize=True, return_dict=True, **template
    )
    return [list(ids) for ids in rendered["input_ids"]]


def runs(prompts: Sequence[Sequence[int]]) -> list[tuple[list[int], int]]:
    """`prompts` with neighbours that are equal joined: (ids, how many)."""
    found: list[tuple[list[int], int]] = []
    for prompt in prompts:
        ids = list(prompt)
        if found and found[-1][0] == ids:
            found[-1] = (ids, found[-1][1] + 1)
        else:
            found.append((ids, 1))
    return found


def check_repeated(grouped: Sequence[tuple[list[int], int]], size: int, *, whole: bool) -> None:
    """`InvalidRequestError` unless every prompt comes a multiple of `size` times in a row, as TRL's sampler does it.

    TRL takes each `size` neighbours for one group, whatever they are, and would compare completions of different
    prompts. whole: False for a rank's part of a batch, which may begin and end within a group.
    """
    inner = grouped if whole else grouped[1:-1]
    odd = next((count for _, count in inner if count % size), None)
    if odd is not None:
        raise InvalidRequestError(
            f"prompts of a batch are not grouped: got one {odd} times in a row, expected a multiple of "
            f"num_generations={size}; leave TRL's own sampler in place"
        )


def sample(
    engine: Any, prompts: Sequence[Sequence[int]], params: Mapping[str, Any], *, version: int
) -> Sampled:
    """One completion for each of `prompts` (token ids); equal neighbours are sampled together and computed once.

    version: nothing is computed before the engine serves weights of this number, or later ones.

    Raises `RolloutError` where a completion was ended from outside, or its log-probabilities do not belong to its
    tokens: TRL takes any numbers for log-probabilities, and trains on half a completion as on a whole one.
    """
    grouped = runs(prompts)
    results = engine.generate(
        input_ids=[ids for ids, _ in grouped],
        sampling_params=[{**params, "n": count} for _, count in grouped],
        return_logprob=True,
        min_weight_version=version,
    )
    results = [results] if isinstance(results, Mapping) else results
    if len(results) != len(prompts):
        raise RolloutError(
            f"the engine's answer does not fit: got {len(results)} completions, expected {len(prompts)}"
        )
    logprobs = [checked_logprobs(result) for result in results]
    oldest = min(oldest_version(result) for result in results)
    if oldest < version:
        raise RolloutError(
            f"completions are too old: got tokens of version {oldest}, expected {version}, which this trainer published"
        )
    return Sampled(
        completion_ids=[list(result["output_ids"]) for result in results], logprobs=logprobs
    )


def oldest_version(result: Mapping[str, Any]) -> int:
    """Number of the oldest weight version that drew a token of this result."""
    return min(span["number"] for span in result["meta_info"]["weight_versions"])


def checked_logprobs(result: Mapping[str, Any]) -> list[float]:
    """The log-probabilities of one result, which must be complete; see `sample`."""
    meta, ids = result["meta_info"], result["output_ids"]
    reason = meta["finish_reason"]
    if reason["type"] == "abort":
        raise RolloutError(
            f"a completion was ended after {len(ids)} tokens: {reason['message']}; nothing may abort the requests of a "
            "trainer"
        )
    if not ids:
        raise RolloutError(
            "got a completion without tokens, expected at least one; look at max_completion_length and the engine's "
            "context_length"
        )
    entries = meta["output_token_logprobs"]
    if [entry[1] for entry in entries] != list(ids) or any(entry[0] is None for entry in entries):
        raise RolloutError(
            f"got {len(entries)} log-probabilities that do not belong to the {len(ids)} tokens, expected one of each"
        )
    return [float(entry[0]) for entry in entries]
