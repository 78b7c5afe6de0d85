"""Turns what the engine loop sends (`SampleUpdate`) into the dictionaries that `Engine.generate` returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from ..protocol.commands import PromptSpec, RoutedExperts, SampleUpdate, TopLogprobs
from ..tokenizer import Tokenizer
from .shown_text import ShownText

LogprobEntry = tuple[float | None, int, str | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Extras:
    """What a caller asked of results that the engine need not know."""

    text_in_logprobs: bool = False
    """The text of each token in log-probability entries."""
    flat_logprobs: bool = False
    """Log-probabilities of output tokens also as plain numbers."""
    token_versions: bool = False
    """Number of the weight version of each output token."""
    prompt_token_ids: bool = False
    """The prompt's token ids."""


class ResultBuilder:
    """Collects the updates of one sample; `result()` is what the caller sees, cumulative at any time."""

    def __init__(
        self,
        spec: PromptSpec,
        tokenizer: Tokenizer | None,
        extras: Extras,
    ) -> None:
        self._spec = spec
        self._params = spec.params
        self._tokenizer = tokenizer
        self._extras = extras
        self._with_text = extras.text_in_logprobs and tokenizer is not None
        self._clear()

    def _clear(self) -> None:
        self._output_ids: list[int] = []
        self._shown = ShownText(self._tokenizer, self._params) if self._tokenizer else None
        self._output_logprobs: list[float] = []
        self._output_top: list[TopLogprobs] = []
        self._output_selected: list[TopLogprobs] = []
        self._token_times: list[float] = []
        self._first: SampleUpdate | None = None
        self._last: SampleUpdate | None = None

    @property
    def finished(self) -> bool:
        """True once the update with the finish reason has been added."""
        return self._last is not None and self._last.finish_reason is not None

    def add(self, update: SampleUpdate) -> None:
        """Append what `update` brings; updates of a sample arrive in order. A rerun starts over."""
        if self._last is not None and update.num_reruns > self._last.num_reruns:
            self._clear()
        self._first = self._first or update
        self._last = update
        self._output_ids += update.output_ids
        self._output_logprobs += update.output_logprobs or ()
        self._output_top += update.output_top_logprobs or ()
        self._output_selected += update.output_ids_logprobs or ()
        self._token_times += update.token_times or ()

    def result(self) -> dict[str, Any]:
        """The public dictionary: `text`, `output_ids`, `meta_info`."""
        first, last = self._first, self._last
        assert first is not None and last is not None, "result() before the first update"
        meta: dict[str, Any] = {
            "id": last.rid,
            "prompt_tokens": last.prompt_tokens,
            "completion_tokens": len(self._output_ids),
            "cached_tokens": last.cached_tokens,
            "finish_reason": _finish_reason(last),
            "context_exhausted": self._context_exhausted(last),
            "engine_id": last.engine_id,
            "weight_version": last.weight_version,
            "weight_version_number": last.weight_version_number,
            "e2e_latency": last.e2e_latency,
            "num_retractions": last.num_retractions,
            "num_reruns": last.num_reruns,
        }
        meta["weight_versions"] = [
            {"version": span.version, "number": span.number, "start": span.start, "end": span.end}
            for span in last.weight_versions
        ]
        self._add_logprobs(meta, first, last)
        if last.token_times is not None:
            meta["token_times"] = list(self._token_times)
        if last.routed_experts is not None:
            meta["routed_experts"] = _experts(last.routed_experts)
        if self._extras.token_versions:
            meta["token_versions"] = self._token_versions(last)
        result = {"text": self._text(last), "output_ids": list(self._output_ids)}
        if self._extras.prompt_token_ids:
            result["prompt_token_ids"] = list(self._spec.input_ids)
        if last.pooled is not None:
            result["pooled"] = last.pooled
        return {**result, "meta_info": meta}

    def _token_versions(self, last: SampleUpdate) -> list[int]:
        numbers = [
            span.number for span in last.weight_versions for _ in range(span.start, span.end)
        ]
        return numbers[: len(self._output_ids)]

    def _context_exhausted(self, last: SampleUpdate) -> bool:
        """The output ended because the context did, before `max_new_tokens` were there."""
        ended_by_length = last.finish_reason is not None and last.finish_reason.type == "length"
        return ended_by_length and len(self._output_ids) < self._params.max_new_tokens

    def _add_logprobs(self, meta: dict[str, Any], first: SampleUpdate, last: SampleUpdate) -> None:
        if last.output_logprobs is not None:
            meta["output_token_logprobs"] = [
                self._entry(value, token)
                for value, token in zip(self._output_logprobs, self._output_ids, strict=True)
            ]
            if self._extras.flat_logprobs:
                meta["output_logprobs"] = list(self._output_logprobs)
            meta["input_token_logprobs"] = [
                self._entry(value, token)
                for value, token in first.input_logprobs or last.input_logprobs or ()
            ]
        if last.output_top_logprobs is not None:
            meta["output_top_logprobs"] = self._table(self._output_top)
            meta["input_top_logprobs"] = self._table(
                first.input_top_logprobs or last.input_top_logprobs or ()
            )
        if last.output_ids_logprobs is not None:
            meta["output_token_ids_logprobs"] = self._table(self._output_selected)
            meta["input_token_ids_logprobs"] = self._table(
                first.input_ids_logprobs or last.input_ids_logprobs or ()
            )

    def _entry(self, value: float | None, token: int) -> LogprobEntry:
        text = self._tokenizer.token_text(token) if self._with_text and self._tokenizer else None
        return (value, token, text)

    def _table(self, rows: Sequence[TopLogprobs | None]) -> list[list[LogprobEntry] | None]:
        return [
            None if row is None else [self._entry(value, token) for value, token in row]
            for row in rows
        ]

    def _text(self, last: SampleUpdate) -> str:
        if self._shown is None:
            return ""
        if last.finish_reason is None:
            return self._shown.so_far(self._output_ids, last.text_end)
        return self._shown.final(self._output_ids, last.finish_reason, last.text_end)


def _experts(routed: RoutedExperts) -> Any:
    """(tokens, layers, experts of a token) int32, an array of the caller's own."""
    import numpy as np

    return np.frombuffer(routed.data, dtype="<i2").astype(np.int32).reshape(routed.shape)


def _finish_reason(update: SampleUpdate) -> dict[str, Any] | None:
    if update.finish_reason is None:
        return None
    reason: dict[str, Any] = msgspec.to_builtins(update.finish_reason)
    return reason
