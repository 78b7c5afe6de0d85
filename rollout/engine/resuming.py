"""Going on with samples that were ended early: what to ask the engine, and how both parts become one result."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from ..errors import InvalidRequestError
from ..protocol.commands import FinishReason
from ..sampling_params import SamplingParams
from ..tokenizer import Tokenizer
from .shown_text import ShownText

Result = dict[str, Any]

_PER_TOKEN = ("output_token_logprobs", "output_logprobs", "token_times", "token_versions")
_SUMMED = ("completion_tokens", "e2e_latency", "num_retractions", "num_reruns")
_WHOLE = ("output_top_logprobs", "output_token_ids_logprobs", "routed_experts")
"""What a part has of its own tokens, or of all that it computed, and that is not joined."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumption:
    """The samples of one `resume` that have something left to draw."""

    rows: list[int]
    """Which of the given results they are."""
    call: dict[str, Any]
    """The arguments of `generate` for them; without prompts where none is left."""


def check_results(results: Any) -> None:
    """`InvalidRequestError` unless `results` is a list of what `generate` returns for a sample."""
    if isinstance(results, Mapping) or not isinstance(results, Sequence):
        raise InvalidRequestError(
            f"resume: got {type(results).__name__}, expected a list of results; put a single one into a list"
        )
    for i, result in enumerate(results):
        if not (isinstance(result, Mapping) and {"output_ids", "meta_info"} <= result.keys()):
            raise InvalidRequestError(
                f"resume: got {type(result).__name__} as result {i}, expected a dictionary with output_ids and "
                "meta_info; pass what generate(..., return_prompt_token_ids=True) returned, samples of all prompts in "
                "one list"
            )


def resumption(
    results: Sequence[Mapping[str, Any]],
    params: Sequence[SamplingParams],
    cache_salt: str | Sequence[str] | None = None,
) -> Resumption:
    """What is left of `results`, whose sampling parameters were `params`; cache_salt: one for all, or each result's.

    Each goes on from prompt and output as its prompt, so what depends on the border between them is refused. A seed is
    mixed with the sample's place and with how much it has drawn: draws are numbered from the border, and the first ones
    were used up.
    """
    salts = _salts(cache_salt, len(results))
    rows, input_ids, left, kept = [], [], [], []
    for i, (result, wanted) in enumerate(zip(results, params, strict=True)):
        if not is_aborted(result):
            continue
        _check(i, result, wanted)
        done = len(result["output_ids"])
        if done >= wanted.max_new_tokens:
            continue
        changes: dict[str, Any] = {
            "n": 1,
            "max_new_tokens": wanted.max_new_tokens - done,
            "min_new_tokens": max(0, wanted.min_new_tokens - done),
        }
        if wanted.sampling_seed is not None:
            changes["sampling_seed"] = _seed(wanted.sampling_seed, i, done)
        rows.append(i)
        left.append(msgspec.structs.replace(wanted, **changes))
        input_ids.append([*result["prompt_token_ids"], *result["output_ids"]])
        kept.append(result["meta_info"])
    call = {
        "input_ids": input_ids,
        "sampling_params": left,
        "return_logprob": ["output_token_logprobs" in meta for meta in kept],
        "return_text_in_logprobs": any(map(_has_texts, kept)),
        "return_token_times": ["token_times" in meta for meta in kept],
        "flat_logprobs": any("output_logprobs" in meta for meta in kept),
        "return_token_versions": any("token_versions" in meta for meta in kept),
        "cache_salt": [salts[i] for i in rows],
    }
    return Resumption(rows=rows, call=call)


def is_aborted(result: Mapping[str, Any]) -> bool:
    """The sample was ended from outside and may go on."""
    reason = result["meta_info"].get("finish_reason")
    return reason is not None and reason["type"] == "abort"


def joined(
    first: Result, second: Result | None, params: SamplingParams, tokenizer: Tokenizer | None
) -> Result:
    """One result of a sample's two parts, as if it had never been ended; second: None where nothing was left to draw.

    `num_resumes` counts how often that was done. Numbers about the prompt are the first part's.
    """
    meta = dict(first["meta_info"])
    ids = list(first["output_ids"])
    if second is None:
        meta["finish_reason"] = {"type": "length", "length": len(ids)}
    else:
        after = second["meta_info"]
        ids += second["output_ids"]
        meta["weight_versions"] = _joined_spans(
            meta["weight_versions"], after["weight_versions"], len(first["output_ids"])
        )
        for name in _PER_TOKEN:
            if name in meta:
                meta[name] = [*meta[name], *after[name]]
        for name in _SUMMED:
            meta[name] += after[name]
        for name in ("weight_version", "weight_version_number", "engine_id", "context_exhausted"):
            meta[name] = after[name]
        meta["finish_reason"] = dict(after["finish_reason"])
        if meta["finish_reason"]["type"] == "length":
            meta["finish_reason"]["length"] = len(ids)
    meta["num_resumes"] = meta.get("num_resumes", 0) + 1
    text = ""
    if tokenizer is not None:
        reason = msgspec.convert(meta["finish_reason"], FinishReason)
        text = ShownText(tokenizer, params).final(ids, reason, None)
    return {**first, "text": text, "output_ids": ids, "meta_info": meta}


def _joined_spans(first: list[Result], second: list[Result], offset: int) -> list[Result]:
    """Spans of output tokens, contiguous, without empty ones unless there is no token at all."""
    shifted = [{**s, "start": s["start"] + offset, "end": s["end"] + offset} for s in second]
    spans = [dict(span) for span in [*first, *shifted] if span["end"] > span["start"]]
    found: list[Result] = []
    for span in spans:
        last = found[-1] if found else None
        if last is not None and (last["version"], last["number"]) == (
            span["version"],
            span["number"],
        ):
            last["end"] = span["end"]
        else:
            found.append(span)
    return found or second


def _check(i: int, result: Mapping[str, Any], params: SamplingParams) -> None:
    if "prompt_token_ids" not in result:
        raise InvalidRequestError(
            f"resume: got result {i} without prompt_token_ids, expected them; generate with "
            "return_prompt_token_ids=True"
        )
    if params.stop:
        raise InvalidRequestError(
            f"resume: got stop={params.stop!r}, expected no strings: one could lie across the border; use "
            "stop_token_ids, or generate the sample again"
        )
    if params.frequency_penalty or params.presence_penalty:
        raise InvalidRequestError(
            "resume: got a frequency_penalty or presence_penalty, expected neither: they count output tokens, and "
            "those before the border are prompt now; generate the sample again"
        )
    whole = [name for name in _WHOLE if name in result["meta_info"]]
    if whole:
        raise InvalidRequestError(
            f"resume: got a result with {whole}, expected none of them; generate without, or generate it again"
        )


def _salts(cache_salt: Any, num: int) -> Sequence[Any]:
    if not isinstance(cache_salt, (list, tuple)):
        return [cache_salt] * num
    if len(cache_salt) != num:
        raise InvalidRequestError(
            f"cache_salt: got {len(cache_salt)}, expected one for all or one for each of {num} results"
        )
    return cache_salt


def _has_texts(meta: Mapping[str, Any]) -> bool:
    """Entries of log-probabilities have their tokens' texts."""
    entries = (*meta.get("output_token_logprobs", ()), *meta.get("input_token_logprobs", ()))
    return any(text is not None for _, _, text in entries)


def _seed(seed: int, row: int, done: int) -> int:
    text = f"{seed} {row} {done}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1
