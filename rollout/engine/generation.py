"""`generate`, `score` and `sequence_logprobs`, each with its `async_` twin."""

from __future__ import annotations

import asyncio
import math
import queue
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import Future
from functools import cached_property
from typing import Any

import msgspec

from ..errors import DeadlineExceeded, InvalidRequestError, RequestAbortedError
from ..protocol.commands import ENDED_LATE, AbortRequests, SampleUpdate
from ..tokenizer import pad_token_id
from .client import EngineClient
from .prepare import PreparedGenerate, prepare
from .twins import Asking, Form, Sent, asks, awaitable, definition_of

Result = dict[str, Any]

#: Arguments of `generate` by what `_prepare` does with them.
_OWN = (
    *("prompt", "sampling_params", "input_ids", "stream", "rid", "return_text_in_logprobs"),
    *("flat_logprobs", "return_token_versions", "return_prompt_token_ids", "min_weight_version"),
    *("attention_mask", "add_special_tokens", "input_embeds"),
)
_PER_PROMPT = (
    *("return_logprob", "logprob_start_len", "top_logprobs_num", "token_ids_logprob"),
    *("return_token_times", "return_routed_experts", "routed_experts_start_len", "cache_salt"),
)
_FOREIGN = (
    *("image_data", "audio_data", "video_data", "lora_path", "custom_logit_processor"),
    *("return_hidden_states", "bootstrap_host", "bootstrap_port", "bootstrap_room"),
    *("data_parallel_rank", "external_trace_header", "session_params"),
    "priority",
)

LONGEST_S = 7 * 86_400.0
"""How long a call may take that has no deadline of its own; the engine ends it long before, should nothing go on."""
MIN_GRACE_S = 2.0
"""How much longer than the deadline a caller waits, at least, for what the engine hands out then."""


class GenerationCalls(EngineClient):
    """The part of `Engine` that computes tokens and log-probabilities."""

    @asks
    def generate(
        self,
        prompt: str | Sequence[str] | None = None,
        sampling_params: Any = None,
        input_ids: Any = None,
        image_data: None = None,
        audio_data: None = None,
        video_data: None = None,
        return_logprob: bool | Sequence[bool] | None = False,
        logprob_start_len: int | Sequence[int] | None = -1,
        top_logprobs_num: int | Sequence[int] | None = 0,
        token_ids_logprob: Sequence[int] | Sequence[Sequence[int] | None] | None = None,
        lora_path: None = None,
        custom_logit_processor: None = None,
        return_hidden_states: bool = False,
        return_routed_experts: bool | Sequence[bool] = False,
        stream: bool = False,
        bootstrap_host: None = None,
        bootstrap_port: None = None,
        bootstrap_room: None = None,
        data_parallel_rank: int | None = None,
        external_trace_header: Any = None,
        rid: str | Sequence[str] | None = None,
        session_params: None = None,
        priority: int | None = None,
        *,
        return_text_in_logprobs: bool = False,
        return_token_times: bool | Sequence[bool] = False,
        routed_experts_start_len: int | Sequence[int] = 0,
        timeout_s: float | None = None,
        attention_mask: Any = None,
        add_special_tokens: bool | None = None,
        flat_logprobs: bool = False,
        return_token_versions: bool = False,
        return_prompt_token_ids: bool = False,
        min_weight_version: int | None = None,
        cache_salt: str | Sequence[str] | None = None,
        input_embeds: Any = None,
        **others: Any,
    ) -> Asking[Any]:
        """Complete prompts.

        Give `prompt` (text), `input_ids` (token ids) or `input_embeds`, one or a list; other arguments are one value
        for all or a list with one per prompt. `sampling_params`: a dictionary (whose `logprobs` is `return_logprob`
        with so many top tokens), `SamplingParams`, or transformers' `GenerationConfig`. Arguments not mentioned here
        belong to the common dialect, whose order this is: refused, or ignored with a warning if no result changes.

        Returns one dictionary for one prompt with n = 1, else a list, prompt-major; with `stream`, an iterator of
        cumulative dictionaries (with their `index` where there are several samples), async from `async_generate`.

        Text gets the special tokens that the tokenizer adds, but no second begin token where a chat template has put
        one; `add_special_tokens` True or False: exactly the tokenizer's, or none. `input_ids` may be tensors or arrays;
        padding is refused unless `attention_mask` says where it is. `input_embeds`: (tokens, hidden size) rows in place
        of embedded tokens, such as a soft prompt; penalties and log-probabilities then know the output alone.

        A result has `text`, `output_ids` (list of int) and `meta_info`; docs/reference.md has all keys. With
        `return_logprob` that has `output_token_logprobs` and `input_token_logprobs` (from position `logprob_start_len`;
        -1: none) as (log-probability, token id, text or None), with `top_logprobs_num` or `token_ids_logprob` their
        tables, with `flat_logprobs` also `output_logprobs`, numbers alone; with `return_token_times` the wall-clock
        time of each token, with `return_token_versions` the number of the version that sampled it, `token_versions`.
        `return_prompt_token_ids` adds `prompt_token_ids` beside `output_ids`; `return_routed_experts`, to a finished
        sample, the experts of its tokens from `routed_experts_start_len` to the last but one, which no one computes
        after: int32 (tokens, layers, k), -1 in layers without experts; an aborted one has those that were computed.
        `min_weight_version`: nothing is computed before a version of this number, or a later one, serves. `cache_salt`:
        prompts share cached prefixes only with those of the same salt.

        There is no deadline unless `timeout_s` gives one: after so many seconds everything comes back as it is then,
        finished samples whole, the others with finish reason "abort" and a message that says why. So they do when the
        engine has computed nothing for `progress_timeout_s` (600 s), be it paused or out of memory.
        Raises `InvalidRequestError` (a `ValueError`) for arguments that cannot be run, before any of them runs;
        `NoUpdateYetError` and `TornWeightsError` while the weights must not be used; `DeadlineExceeded` when the engine
        does not even answer; `EngineDiedError` when its process is gone.
        """
        if is_empty(others.get("text", prompt)) and input_ids is None and input_embeds is None:
            return (yield Form(iter(()), _nothing())) if stream else []
        prepared = self._prepare(locals())
        if not stream:
            return (yield from self._whole(prepared, timeout_s, "generate"))
        streamed = yield Form(self._stream, self._async_stream)
        return streamed(prepared, self._limit(prepared, timeout_s))

    async_generate = awaitable(generate)

    @asks
    def score(
        self,
        query: str | Sequence[int],
        items: str | Sequence[Any],
        label_token_ids: Sequence[int],
        apply_softmax: bool = False,
        item_first: bool = False,
        timeout_s: float | None = None,
    ) -> Asking[list[list[float]]]:
        """Probability of each label token after query + item (item + query if `item_first`), one row per item.

        Text is concatenated as text, token ids as token ids. With `apply_softmax` a row is normalised over the labels,
        else it holds probabilities over the whole vocabulary. Uses temperature 1.
        """
        call = _score_call(query, items, label_token_ids, item_first)
        results = (yield from _generate(self, **call, timeout_s=timeout_s)) if call else []
        return _label_probabilities(results, apply_softmax)

    async_score = awaitable(score)

    @asks
    def sequence_logprobs(
        self,
        sequences: Sequence[Sequence[int]],
        *,
        start: int | Sequence[int] = 0,
        timeout_s: float | None = None,
    ) -> Asking[list[list[float | None]]]:
        """Log-probability of each given token under the current weights (temperature 1), from position `start` on.

        What PPO and GRPO need of the old and of the reference policy. Row i has len(sequences[i]) - start entries;
        position 0 has no log-probability and is None. Raises `DeadlineExceeded` unless all are there in time.
        """
        call = _logprobs_call(sequences, start)
        results = (yield from _generate(self, **call, timeout_s=timeout_s)) if call else []
        return _logprobs(results)

    async_sequence_logprobs = awaitable(sequence_logprobs)

    # ---- below the surface -----------------------------------------------------------------------------------------

    def _prepare(self, arguments: dict[str, Any]) -> PreparedGenerate:
        """`arguments`: the local names of `generate` at its beginning."""
        given = {name: arguments[name] for name in _OWN}
        others = {name: arguments[name] for name in _FOREIGN} | arguments["others"]
        text = others.pop("text", None)
        if text is not None and given["prompt"] is not None:
            raise InvalidRequestError(
                "generate: got prompt and text, expected one: they mean the same"
            )
        given["prompt"] = given["prompt"] if text is None else text
        per_prompt = {name: arguments[name] for name in _PER_PROMPT}
        return prepare(
            self._tokenizer,
            **given,
            per_prompt=per_prompt,
            others=others,
            pad_token_id=self._pad_token_id,
        )

    @cached_property
    def _pad_token_id(self) -> int | None:
        if self._tokenizer is not None:
            return self._tokenizer.pad_token_id
        return pad_token_id(self.config.model_path)

    def _whole(
        self, prepared: PreparedGenerate, timeout_s: float | None, what: str
    ) -> Asking[Result | list[Result]]:
        """Send it, and all results once they are there; nothing of it runs on when nobody waits any more."""
        limit = self._limit(prepared, timeout_s)
        future = self._executor.submit(prepared.command, timeout_s=limit, on_chunk=prepared.add)
        try:
            yield Sent(future, limit, what)
        except BaseException:
            self._abandon(prepared, future)
            raise
        return prepared.result()

    def _stream(self, prepared: PreparedGenerate, limit: float) -> Iterator[Result]:
        updates: queue.SimpleQueue[SampleUpdate | None] = queue.SimpleQueue()
        future = self._executor.submit(prepared.command, timeout_s=limit, on_chunk=updates.put)
        future.add_done_callback(lambda _: updates.put(None))
        try:
            while (update := updates.get()) is not None:
                yield prepared.chunk(update)
            future.result()
        finally:
            self._abandon(prepared, future)

    async def _async_stream(
        self, prepared: PreparedGenerate, limit: float
    ) -> AsyncIterator[Result]:
        updates: asyncio.Queue[SampleUpdate | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def put(update: SampleUpdate | None) -> None:
            loop.call_soon_threadsafe(updates.put_nowait, update)

        future = self._executor.submit(prepared.command, timeout_s=limit, on_chunk=put)
        future.add_done_callback(lambda _: put(None))
        try:
            while (update := await updates.get()) is not None:
                yield prepared.chunk(update)
            future.result()
        finally:
            self._abandon(prepared, future)

    def _abandon(self, prepared: PreparedGenerate, future: Future[Any]) -> None:
        """Nobody waits for the answer any more: do not compute it."""
        if not future.done() or future.cancelled():
            self._executor.submit(AbortRequests(rids=prepared.rids), timeout_s=self._timeout(None))

    def _limit(self, prepared: PreparedGenerate, timeout_s: float | None) -> float:
        """How long to wait for the engine: longer than `timeout_s`, at which it hands out what there is."""
        if timeout_s is None:
            return LONGEST_S
        limit = min(self._positive(timeout_s), LONGEST_S - MIN_GRACE_S)
        grace_s = min(max(MIN_GRACE_S, 0.1 * limit), LONGEST_S - limit)
        prepared.command = msgspec.structs.replace(prepared.command, grace_s=grace_s)
        return limit + grace_s


_generate = definition_of(GenerationCalls.generate)


def is_empty(prompt: Any) -> bool:
    return isinstance(prompt, (list, tuple)) and not prompt


async def _nothing() -> AsyncIterator[Result]:
    return
    yield {}  # Unreachable: it makes this a generator.


def _score_call(
    query: Any, items: Any, label_token_ids: Sequence[int], item_first: bool
) -> dict[str, Any]:
    """Arguments of the `generate` behind `score`; empty where there is nothing to score."""
    labels = list(label_token_ids)
    if not labels:
        raise InvalidRequestError("score: got no label_token_ids, expected at least one")
    rows = [items] if isinstance(items, str) else list(items)
    is_text = isinstance(query, str)
    if any(isinstance(item, str) != is_text for item in rows):
        raise InvalidRequestError(
            "score: got text and token ids mixed, expected query and items of one kind"
        )
    if not rows:
        return {}
    joined = [_joined(query, item, item_first) for item in rows]
    # Greedy log-probabilities are untempered, so the drawn token does not matter and the rule of `generate` holds.
    return {
        "prompt": joined if is_text else None,
        "input_ids": None if is_text else joined,
        "sampling_params": {"max_new_tokens": 1, "temperature": 0.0},
        "return_logprob": True,
        "token_ids_logprob": labels,
    }


def _joined(query: Any, item: Any, item_first: bool) -> Any:
    first, second = (item, query) if item_first else (query, item)
    return first + second if isinstance(first, str) else [*first, *second]


def _label_probabilities(results: list[Result], apply_softmax: bool) -> list[list[float]]:
    rows = []
    for result in whole_results("score", results):
        values = [value for value, _, _ in result["meta_info"]["output_token_ids_logprobs"][0]]
        probabilities = [math.exp(value) for value in values]
        total = sum(probabilities) if apply_softmax else 1.0
        rows.append([p / total for p in probabilities])
    return rows


def _logprobs_call(
    sequences: Sequence[Sequence[int]], start: int | Sequence[int]
) -> dict[str, Any]:
    if not len(sequences):
        return {}
    return {
        "input_ids": [list(ids) for ids in sequences],
        "sampling_params": {"max_new_tokens": 0},
        "return_logprob": True,
        "logprob_start_len": list(start) if isinstance(start, Sequence) else start,
    }


def _logprobs(results: list[Result]) -> list[list[float | None]]:
    return [
        [value for value, _, _ in result["meta_info"]["input_token_logprobs"]]
        for result in whole_results("sequence_logprobs", results)
    ]


def whole_results(what: str, results: list[Result]) -> list[Result]:
    """`results`, or an error where one was ended early: half an answer is none here."""
    for result in results:
        reason = result["meta_info"]["finish_reason"]
        if reason["type"] == "abort":
            message = f"{what}: not all was computed: {reason['message']}"
            late = reason["message"].startswith(ENDED_LATE)
            raise DeadlineExceeded(message) if late else RequestAbortedError(message)
    return results
