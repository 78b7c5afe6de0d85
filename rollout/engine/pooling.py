"""What is read off the last position of whole sequences, each call with its `async_` twin.

`classify`: the scores of a sequence-classification checkpoint, such as a reward model. `encode`: the hidden state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .generation import GenerationCalls, is_empty, whole_results
from .prepare import PreparedGenerate, prepare
from .twins import Asking, asks, awaitable

Scores = list[float] | list[list[float]] | list[dict[str, Any]] | dict[str, Any]
"""One number for each sequence, or one list of `num_labels` numbers where there are several labels."""


Embedding = dict[str, Any]

#: Arguments of both calls, and those that `encode` has from the common dialect.
_OWN = (
    *("prompt", "input_ids", "rid"),
    *("attention_mask", "add_special_tokens", "min_weight_version"),
)
_FOREIGN = ("image_data", "audio_data", "video_data")


class PoolingCalls(GenerationCalls):
    """The part of `Engine` that draws nothing: scores and embeddings of whole sequences."""

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
        prepared = self._prepare_pooled("classify", "score", locals())
        answer = yield from self._whole(prepared, timeout_s, "classify")
        return _scores(prepared, answer, return_meta_info)

    async_classify = awaitable(classify)

    @asks
    def encode(
        self,
        prompt: str | Sequence[str] | None = None,
        image_data: None = None,
        audio_data: None = None,
        video_data: None = None,
        *,
        input_ids: Any = None,
        rid: str | Sequence[str] | None = None,
        attention_mask: Any = None,
        add_special_tokens: bool | None = None,
        min_weight_version: int | None = None,
        timeout_s: float | None = None,
        **others: Any,
    ) -> Asking[Embedding | list[Embedding]]:
        """Embed each sequence: the hidden state of its last token after the model's last norm, as it is (not scaled to
        length 1).

        Give `prompt` (text) or `input_ids` (token ids), one or a list, as to `generate`; with the same `rid`,
        `attention_mask`, `add_special_tokens`, `min_weight_version`. Returns {"embedding": hidden_size floats,
        "meta_info": as of `generate`} for one sequence, a list of these for a list. Every checkpoint can be asked, with
        the weights that serve at that moment.

        Raises `InvalidRequestError` for what cannot be run, and `DeadlineExceeded` unless all embeddings are there in
        `timeout_s` seconds (None: no deadline).
        """
        if is_empty(prompt) and input_ids is None:
            return []
        prepared = self._prepare_pooled("encode", "embedding", locals())
        answer = yield from self._whole(prepared, timeout_s, "encode")
        return _embeddings(prepared, answer)

    async_encode = awaitable(encode)

    def _prepare_pooled(
        self, call: str, pooling: str, arguments: dict[str, Any]
    ) -> PreparedGenerate:
        """What such a call asks of each last position; `arguments`: its local names at its beginning."""
        foreign = {name: arguments[name] for name in _FOREIGN if name in arguments}
        return prepare(
            self._tokenizer,
            call=call,
            pooling=pooling,
            **{name: arguments[name] for name in _OWN},
            others=foreign | arguments.get("others", {}),
            pad_token_id=self._pad_token_id,
            sampling_params={"max_new_tokens": 0},
            stream=False,
            return_text_in_logprobs=False,
            flat_logprobs=False,
            return_token_versions=False,
            return_prompt_token_ids=False,
            per_prompt={"token_ids_logprob": None, "top_logprobs_num": 0, "return_logprob": False},
        )


def _scores(prepared: PreparedGenerate, answer: Any, return_meta_info: bool) -> Scores:
    results = whole_results("classify", [answer] if prepared.single else answer)
    if return_meta_info:
        whole = [{"scores": r["pooled"], "meta_info": r["meta_info"]} for r in results]
        return whole[0] if prepared.single else whole
    rows = [result["pooled"] for result in results]
    return [row[0] for row in rows] if len(rows[0]) == 1 else rows


def _embeddings(prepared: PreparedGenerate, answer: Any) -> Embedding | list[Embedding]:
    results = whole_results("encode", [answer] if prepared.single else answer)
    rows = [{"embedding": r["pooled"], "meta_info": r["meta_info"]} for r in results]
    return rows[0] if prepared.single else rows
