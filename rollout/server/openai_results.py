"""From the engine's results to the answers of the OpenAI API."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..tokenizer import Tokenizer

Result = dict[str, Any]
Entries = Sequence[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What one request wants its answer to look like."""

    is_chat: bool
    model: str
    tokenizer: Tokenizer | None
    num_logprobs: int | None = None
    """Most likely tokens at each position; None: no log-probabilities."""
    prompt_logprobs: int | None = None
    echo: bool = False
    token_ids: bool = False
    tokens_as_ids: bool = False
    num_samples: int = 1
    """Samples of each prompt."""
    id: str = ""
    created: int = 0

    @classmethod
    def new(cls, **fields: Any) -> Shape:
        """One with an id of its own."""
        kind = "chatcmpl" if fields["is_chat"] else "cmpl"
        return cls(**fields, id=f"{kind}-{uuid.uuid4().hex}", created=int(time.time()))

    def word(self, token: int) -> str:
        """A token as log-probabilities show it."""
        if self.tokens_as_ids or self.tokenizer is None:
            return f"token_id:{token}"
        return self.tokenizer.token_text(token)

    def prompt_text(self, result: Result) -> str:
        """Text of the prompt, from its tokens."""
        if self.tokenizer is None:
            return ""
        return self.tokenizer.decode(result["prompt_token_ids"], skip_special_tokens=False)


def whole(shape: Shape, results: Sequence[Result]) -> dict[str, Any]:
    """The answer of a request that does not stream."""
    choices = [_choice(shape, i, result) for i, result in enumerate(results)]
    answer: dict[str, Any] = {
        "id": shape.id,
        "object": "chat.completion" if shape.is_chat else "text_completion",
        "created": shape.created,
        "model": shape.model,
        "choices": choices,
        "usage": usage(shape, results),
        "metadata": metadata(results),
    }
    if shape.is_chat and shape.token_ids:
        answer["prompt_token_ids"] = results[0]["prompt_token_ids"]
    if shape.is_chat and shape.prompt_logprobs is not None:
        answer["prompt_logprobs"] = prompt_logprobs(shape, results[0])
    return answer


def _choice(shape: Shape, index: int, result: Result) -> dict[str, Any]:
    meta = result["meta_info"]
    choice: dict[str, Any] = {"index": index, **reasons(meta["finish_reason"])}
    if shape.is_chat:
        choice["message"] = {"role": "assistant", "content": result["text"]}
        choice["logprobs"] = chat_logprobs(shape, meta, 0)
    else:
        choice["text"] = (shape.prompt_text(result) if shape.echo else "") + result["text"]
        choice["logprobs"] = completion_logprobs(shape, meta, 0, with_prompt=shape.echo)
        if shape.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(shape, result)
        if shape.token_ids:
            choice["prompt_token_ids"] = result["prompt_token_ids"]
    if shape.token_ids:
        choice["token_ids"] = result["output_ids"]
    return choice


class Deltas:
    """Cumulative results as the chunks of a stream."""

    def __init__(self, shape: Shape, with_usage: bool) -> None:
        self._shape = shape
        self._with_usage = with_usage
        self._sent: dict[int, tuple[int, int]] = {}  # index -> characters, tokens
        self._last: dict[int, Result] = {}

    def chunks(self, result: Result) -> list[dict[str, Any]]:
        """What to send for a result."""
        index = result.get("index", 0)
        is_first = index not in self._sent
        characters, tokens = self._sent.get(index, (0, 0))
        self._sent[index] = (len(result["text"]), len(result["output_ids"]))
        self._last[index] = result
        text, ids = result["text"][characters:], result["output_ids"][tokens:]
        meta, shape = result["meta_info"], self._shape
        choice: dict[str, Any] = {"index": index, **reasons(meta["finish_reason"])}
        if shape.token_ids:
            choice["token_ids"] = ids
        if shape.is_chat:
            choice["delta"] = {"content": text}
            choice["logprobs"] = chat_logprobs(shape, meta, tokens)
            opening = {"index": index, "delta": {"role": "assistant", "content": ""}}
            first = [self._chunk([{**opening, "finish_reason": None}])] if is_first else []
            if first and shape.token_ids:
                first[0]["prompt_token_ids"] = result["prompt_token_ids"]
            return [*first, self._chunk([choice], meta)]
        echo = shape.echo and is_first
        choice["text"] = (shape.prompt_text(result) if echo else "") + text
        choice["logprobs"] = completion_logprobs(shape, meta, tokens, with_prompt=echo)
        if is_first and shape.token_ids:
            choice["prompt_token_ids"] = result["prompt_token_ids"]
        return [self._chunk([choice], meta)]

    def end(self) -> dict[str, Any] | None:
        """The chunk that counts tokens; None: nobody asked for it."""
        if not self._with_usage:
            return None
        results = [self._last[index] for index in sorted(self._last)]
        return {**self._chunk([]), "usage": usage(self._shape, results)}

    def _chunk(self, choices: list[Any], meta: dict[str, Any] | None = None) -> dict[str, Any]:
        chunk: dict[str, Any] = {
            "id": self._shape.id,
            "object": "chat.completion.chunk" if self._shape.is_chat else "text_completion",
            "created": self._shape.created,
            "model": self._shape.model,
            "choices": choices,
        }
        if meta is not None and meta["finish_reason"] is not None:
            chunk["metadata"] = {
                "weight_version": meta["weight_version"],
                "weight_versions": meta["weight_versions"],
            }
        return chunk


def reasons(reason: dict[str, Any] | None) -> dict[str, Any]:
    """Why a choice ended, in the words of each dialect."""
    if reason is None:
        return {"finish_reason": None}
    matched = reason.get("matched")
    found = {"finish_reason": reason["type"], "stop_reason": matched, "matched_stop": matched}
    if reason.get("message"):
        found["abort_reason"] = reason["message"]
    return found


def metadata(results: Sequence[Result]) -> dict[str, Any]:
    """The version that serves, and the spans of versions of each choice."""
    return {
        "weight_version": results[-1]["meta_info"]["weight_version"],
        "weight_versions": [result["meta_info"]["weight_versions"] for result in results],
    }


def usage(shape: Shape, results: Sequence[Result]) -> dict[str, Any]:
    """Tokens; a prompt counts once, whatever the number of its samples."""
    prompts = results[:: shape.num_samples]
    prompt = sum(result["meta_info"]["prompt_tokens"] for result in prompts)
    output = sum(result["meta_info"]["completion_tokens"] for result in results)
    cached = sum(result["meta_info"]["cached_tokens"] for result in prompts)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def completion_logprobs(
    shape: Shape, meta: dict[str, Any], first: int, *, with_prompt: bool
) -> dict[str, Any] | None:
    """The parallel lists of the completions API, from output token `first` on."""
    if shape.num_logprobs is None:
        return None
    entries = list(meta["output_token_logprobs"][first:])
    tops = list((meta.get("output_top_logprobs") or [])[first:]) or [None] * len(entries)
    if with_prompt:
        own = list(meta["input_token_logprobs"])
        entries = own + entries
        tops = (list(meta.get("input_top_logprobs") or ()) or [None] * len(own)) + tops
    words = [shape.word(token) for _, token, _ in entries]
    offsets, at = [], 0
    for word in words:
        offsets.append(at)
        at += len(word)
    return {
        "tokens": words,
        "token_logprobs": [value for value, _, _ in entries],
        "top_logprobs": [
            None if entry[0] is None else _likely(shape, entry, top)
            for entry, top in zip(entries, tops, strict=True)
        ],
        "text_offset": offsets,
    }


def _likely(shape: Shape, entry: Any, top: Entries | None) -> dict[str, float]:
    found = {shape.word(entry[1]): entry[0]}
    for value, token, _ in (top or ())[: shape.num_logprobs]:
        found.setdefault(shape.word(token), value)
    return found


def chat_logprobs(shape: Shape, meta: dict[str, Any], first: int) -> dict[str, Any] | None:
    """The list of the chat API, from output token `first` on."""
    if shape.num_logprobs is None:
        return None
    entries = meta["output_token_logprobs"][first:]
    tops = (meta.get("output_top_logprobs") or [])[first:] or [()] * len(entries)
    return {
        "content": [
            {
                **_word_entry(shape, value, token),
                "top_logprobs": [
                    _word_entry(shape, v, t) for v, t, _ in (top or ())[: shape.num_logprobs]
                ],
            }
            for (value, token, _), top in zip(entries, tops, strict=True)
        ]
    }


def _word_entry(shape: Shape, value: float, token: int) -> dict[str, Any]:
    word = shape.word(token)
    return {"token": word, "logprob": value, "bytes": list(word.encode())}


def prompt_logprobs(shape: Shape, result: Result) -> list[dict[str, Any] | None]:
    """Of each prompt token, by token id: its log-probability and those of the most likely ones."""
    meta = result["meta_info"]
    entries = meta["input_token_logprobs"]
    tops = meta.get("input_top_logprobs") or [None] * len(entries)
    rows: list[dict[str, Any] | None] = []
    for (value, token, _), top in zip(entries, tops, strict=True):
        if value is None:
            rows.append(None)
            continue
        ranked = list(top or ())[: shape.prompt_logprobs]
        row = {
            str(t): {"logprob": v, "rank": rank, "decoded_token": shape.word(t)}
            for rank, (v, t, _) in enumerate(ranked, start=1)
        }
        row.setdefault(
            str(token), {"logprob": value, "rank": None, "decoded_token": shape.word(token)}
        )
        rows.append(row)
    return rows
