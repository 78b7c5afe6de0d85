"""What OpenRLHF passes to an engine and reads from it, in the shapes that it knows from vLLM; vLLM is not needed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rollout.errors import InvalidRequestError, RolloutError

#: Names of vLLM's sampling parameters and ours; what has another name here is translated.
_NAMES = {
    "max_tokens": "max_new_tokens",
    "min_tokens": "min_new_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "n": "n",
    "seed": "sampling_seed",
    "stop": "stop",
    "stop_token_ids": "stop_token_ids",
    "ignore_eos": "ignore_eos",
    "skip_special_tokens": "skip_special_tokens",
    "include_stop_str_in_output": "no_stop_trim",
    "logit_bias": "logit_bias",
}
#: What vLLM has and this engine does not: it would change what is drawn, so it is refused where it asks for something.
_UNKNOWN_HERE = (
    *("allowed_token_ids", "bad_words", "best_of", "guided_decoding", "logits_processors"),
    *("prompt_logprobs", "structured_outputs", "truncate_prompt_tokens"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Logprob:
    """One token's log-probability."""

    logprob: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionOutput:
    """One sample of a prompt."""

    index: int
    """Its number among the samples of the prompt."""
    text: str
    """Empty where the engine works on token ids alone."""
    token_ids: list[int]
    """What was sampled, the end token included."""
    logprobs: list[dict[int, Logprob]] | None
    """For each token a table with its own log-probability; None: not asked for."""
    finish_reason: str
    """"stop" or "length"."""
    stop_reason: int | str | None
    """The token or string that ended it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutput:
    """All samples of one prompt."""

    request_id: str
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = True
    weight_versions: list[list[dict[str, Any]]] = field(default_factory=list)
    """For each sample, which output tokens came from which version (`meta_info["weight_versions"]`)."""


def sampling_call(params: Any) -> tuple[dict[str, Any], bool]:
    """Our sampling parameters, and whether log-probabilities are wanted.

    `params`: vLLM's `SamplingParams` or any object with its attributes, or a dictionary with their names; None stands
    for a default. A dictionary may also have our names, which `Engine.generate` checks. Raises `InvalidRequestError`
    for what vLLM would do and this engine does not.
    """
    if isinstance(params, Mapping):
        given = dict(params)
    else:
        names = (*_NAMES, *_UNKNOWN_HERE, "logprobs")
        given = {name: getattr(params, name) for name in names if hasattr(params, name)}
    unknown = {name: given.pop(name) for name in _UNKNOWN_HERE if name in given}
    asked = [f"{name}={value!r}" for name, value in unknown.items() if value not in (None, [])]
    if asked:
        raise InvalidRequestError(
            f"sampling_params: got {', '.join(asked)}, expected none of these; this engine has no such option"
        )
    logprobs = given.pop("logprobs", None)
    wants_logprobs = logprobs is not None and logprobs is not False  # 0: of the sampled token alone
    ours = {_NAMES.get(name, name): value for name, value in given.items() if value is not None}
    return ours, wants_logprobs


def request_output(results: list[Mapping[str, Any]], prompt_ids: list[int]) -> RequestOutput:
    """The samples of one prompt as `Engine.generate` returned them; `RolloutError` where one was ended from outside."""
    outputs = []
    for index, result in enumerate(results):
        meta = result["meta_info"]
        if meta["finish_reason"]["type"] == "abort":
            raise RolloutError(
                f"a sample was ended after {len(result['output_ids'])} tokens: {meta['finish_reason']['message']}; "
                "nothing may abort the requests of a trainer"
            )
        entries = meta.get("output_token_logprobs")
        tables = None
        if entries is not None:
            tables = [{token: Logprob(logprob=value)} for value, token, _ in entries]
        outputs.append(
            CompletionOutput(
                index=index,
                text=result["text"],
                token_ids=list(result["output_ids"]),
                logprobs=tables,
                finish_reason=meta["finish_reason"]["type"],
                stop_reason=meta["finish_reason"].get("matched"),
            )
        )
    return RequestOutput(
        request_id=results[0]["meta_info"]["id"],
        prompt_token_ids=list(prompt_ids),
        outputs=outputs,
        weight_versions=[result["meta_info"]["weight_versions"] for result in results],
    )


def response(
    prompt: str, label: Any, prompt_ids: list[int], sample: CompletionOutput
) -> dict[str, Any]:
    """One sample as OpenRLHF's sample generator reads it: prompt and output in one row, without a reward."""
    ids = [*prompt_ids, *sample.token_ids]
    logprobs = None
    if sample.logprobs is not None:
        own = [
            table[token].logprob
            for table, token in zip(sample.logprobs, sample.token_ids, strict=True)
        ]
        logprobs = [0.0] * len(prompt_ids) + own
    return {
        "prompt": prompt,
        "label": label,
        "observation_tokens": ids,
        "action_ranges": [(len(prompt_ids), len(ids))],
        "rollout_log_probs": logprobs,
        "truncated": sample.finish_reason == "length",
        "reward": None,
        "scores": None,
        "extra_logs": {},
        "images": None,
        "mm_train_inputs": None,
    }
