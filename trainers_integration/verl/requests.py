"""One request of verl's agent loops as a call of `Engine.generate`, and its result as verl reads it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rollout.errors import InvalidRequestError


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What verl's configuration says of lengths and seeds."""

    prompt_length: int
    """Tokens that verl leaves for a prompt."""
    response_length: int
    """Tokens that verl leaves for a response."""
    ignore_eos: bool
    """Go on after an end token."""
    seed: int | None
    """With full determinism: a sample's seed follows from this and its request id. None: from the engine's own."""


def generate_call(
    prompt_ids: Sequence[int], sampling_params: Mapping[str, Any], request_id: str, limits: Limits
) -> dict[str, Any]:
    """Arguments of `Engine.generate`. `sampling_params` is left as it is: verl reuses its dictionary.

    Without a limit of its own a request gets what verl's tensors have room for. `logprobs` is a bool there;
    `prompt_logprobs` (a teacher's) is None or how many of the most likely tokens are wanted of each prompt token.
    """
    params = dict(sampling_params)
    room = limits.prompt_length + limits.response_length - len(prompt_ids)
    longest = max(0, min(limits.response_length, room))
    given = [
        params.pop(name)
        for name in ("max_new_tokens", "max_tokens")
        if params.get(name) is not None
    ]
    for name in ("max_new_tokens", "max_tokens"):
        params.pop(name, None)
    params["max_new_tokens"] = max(0, int(given[0])) if given else longest
    params.setdefault("ignore_eos", limits.ignore_eos)
    if limits.seed is not None:
        digest = hashlib.sha256(f"{limits.seed}:{request_id}".encode()).digest()
        params.setdefault("sampling_seed", int.from_bytes(digest[:7], "little"))
    num_top = params.pop("prompt_logprobs", None)
    call: dict[str, Any] = {
        "input_ids": [int(token) for token in prompt_ids],
        "return_logprob": bool(params.pop("logprobs", False)) or num_top is not None,
        "sampling_params": params,
    }
    if num_top is not None:
        call["logprob_start_len"] = 0
        call["top_logprobs_num"] = num_top
    return call


def token_output(result: Mapping[str, Any], call: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of verl's `TokenOutput`.

    `extra_fields` say exactly which trainer steps computed the tokens (`global_steps`: the last one's), also where
    weights changed in the middle of a response.
    """
    meta = result["meta_info"]
    reason = meta["finish_reason"]["type"]
    entries = meta.get("output_token_logprobs")
    spans = [span for span in meta["weight_versions"] if span["end"] > span["start"]]
    steps = [step_of(span["version"]) for span in spans] or [step_of(meta["weight_version"])]
    known = [step for step in steps if step is not None]
    extra: dict[str, Any] = {
        "global_steps": steps[-1],
        "min_global_steps": min(known, default=None),
        "max_global_steps": max(known, default=None),
        "num_cached_tokens": meta["cached_tokens"],
    }
    if "logprob_start_len" in call:
        extra |= prompt_logprobs(meta, call["top_logprobs_num"])
    return {
        "token_ids": result["output_ids"],
        "log_probs": None if entries is None else [value for value, _, _ in entries],
        "stop_reason": "aborted" if reason == "abort" else "completed",
        "num_preempted": meta["num_retractions"],
        "extra_fields": extra,
    }


def step_of(label: str) -> int | None:
    """The trainer's step that a version is labelled with; None: it has another label."""
    return int(label) if label.lstrip("-").isdecimal() else None


def prompt_logprobs(meta: Mapping[str, Any], num_top: int) -> dict[str, list[list[Any]]]:
    """`prompt_ids` and `prompt_logprobs`, (prompt tokens, max(num_top, 1)): row i is about token i + 1, and the last
    row, about which the prompt says nothing, is zeros."""
    if num_top == 0:
        rows = [[entry] for entry in meta["input_token_logprobs"][1:]]
    else:
        rows = meta["input_top_logprobs"][1:]
    width = max(num_top, 1)
    return {
        "prompt_ids": [[token for _, token, _ in row] for row in rows] + [[0] * width],
        "prompt_logprobs": [[value for value, _, _ in row] for row in rows] + [[0.0] * width],
    }


def refuse_media(**media: Any) -> None:
    """Images, videos and audio cannot be dropped without making answers blind."""
    got = [name for name, value in media.items() if value is not None and len(value) > 0]
    if got:
        raise InvalidRequestError(
            f"generate: got {', '.join(got)}, expected text alone; this engine has no multi-modal models"
        )
