"""`classify`: the scores of a sequence-classification checkpoint, such as a reward model, with its `async_` twin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .generation import GenerationCalls, is_empty, whole_results
from .prepare import PreparedGenerate, prepare
from .twins import Asking, asks, awaitable

Scores = list[float] | list[list[float]] | list[dict[str, Any]] | dict[str, Any]
"""One number for each sequence, or one list of `num_labels` numbers where there are several labels."""


class ClassificationCalls(GenerationCalls):
    """The part of `Engine` that computes scores of whole sequences, beside what generates."""

    @asks
    def classify(
        self,
        prompt: str | Sequence[str] | None = None,
        input_ids: Any = None,
        *,
        attention_mask: Any = None,
        add_special_tokens: bool | None = None,
        min_weight_version: int | None = None,
        timeout_s: float | None = None,
        rid: str | Sequence[str] | None = None,
        return_meta_info: bool = False,
    ) -> Asking[Scores]:
        """Score each sequence with a `...ForSequenceClassification` checkpoint: what its head says of the last token.

        Give `prompt` (text) or `input_ids` (token ids), one or a list, as to `generate`; text gets the special tokens
        that the tokenizer adds. Returns a list with one entry for each sequence: a number where the checkpoint has one
        label, as reward models do, else `num_labels` numbers. They are the head's float32 outputs, before any softmax
        or sigmoid. The weights, head included, are updated like a policy's; nothing is computed before version
        `min_weight_version` serves. With `return_meta_info` each entry is {"scores": num_labels numbers,
        "meta_info": as of `generate`}, and one sequence that is not in a list has one without a list.

        Raises `InvalidRequestError` for what cannot be scored, also where the checkpoint generates instead, and
        `DeadlineExceeded` unless all scores are there in `timeout_s` seconds (None: no deadline).
        """
        if is_empty(prompt) or is_empty(input_ids):
            return []
        prepared = self._prepare_scores(locals())
        answer = yield from self._whole(prepared, timeout_s, "classify")
        return _scores(prepared, answer, return_meta_info)

    async_classify = awaitable(classify)

    def _prepare_scores(self, arguments: dict[str, Any]) -> PreparedGenerate:
        """`arguments`: the local names of `classify` at its beginning."""
        options = ("attention_mask", "add_special_tokens", "min_weight_version", "rid")
        return self._prepare_pooled(
            "classify",
            "score",
            arguments["prompt"],
            arguments["input_ids"],
            **{name: arguments[name] for name in options},
        )

    def _prepare_pooled(
        self,
        call: str,
        pooling: str,
        prompt: Any,
        input_ids: Any,
        *,
        attention_mask: Any,
        add_special_tokens: bool | None,
        min_weight_version: int | None,
        rid: Any = None,
        others: Mapping[str, Any] | None = None,
    ) -> PreparedGenerate:
        """What a call that draws nothing asks of the last position of each sequence."""
        return prepare(
            self._tokenizer,
            call=call,
            prompt=prompt,
            input_ids=input_ids,
            sampling_params={"max_new_tokens": 0},
            stream=False,
            rid=rid,
            return_text_in_logprobs=False,
            flat_logprobs=False,
            return_token_versions=False,
            return_prompt_token_ids=False,
            min_weight_version=min_weight_version,
            per_prompt={"token_ids_logprob": None, "top_logprobs_num": 0, "return_logprob": False},
            others=others or {},
            attention_mask=attention_mask,
            add_special_tokens=add_special_tokens,
            pad_token_id=self._pad_token_id,
            pooling=pooling,
        )


def _scores(prepared: PreparedGenerate, answer: Any, return_meta_info: bool) -> Scores:
    results = whole_results("classify", [answer] if prepared.single else answer)
    if return_meta_info:
        whole = [{"scores": r["pooled"], "meta_info": r["meta_info"]} for r in results]
        return whole[0] if prepared.single else whole
    rows = [result["pooled"] for result in results]
    return [row[0] for row in rows] if len(rows[0]) == 1 else rows
