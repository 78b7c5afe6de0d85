"""`encode`: the hidden state with which a model leaves a sequence, with its `async_` twin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .classification import ClassificationCalls
from .generation import is_empty, whole_results
from .prepare import PreparedGenerate
from .twins import Asking, asks, awaitable

Embedding = dict[str, Any]


class EmbeddingCalls(ClassificationCalls):
    """The part of `Engine` that computes embeddings of whole sequences, beside what generates and scores."""

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
        prepared = self._prepare_embeddings(locals())
        answer = yield from self._whole(prepared, timeout_s, "encode")
        return _embeddings(prepared, answer)

    async_encode = awaitable(encode)

    def _prepare_embeddings(self, arguments: dict[str, Any]) -> PreparedGenerate:
        """`arguments`: the local names of `encode` at its beginning."""
        foreign = ("image_data", "audio_data", "video_data")
        return self._prepare_pooled(
            "encode",
            "embedding",
            arguments["prompt"],
            arguments["input_ids"],
            rid=arguments["rid"],
            attention_mask=arguments["attention_mask"],
            add_special_tokens=arguments["add_special_tokens"],
            min_weight_version=arguments["min_weight_version"],
            others={name: arguments[name] for name in foreign} | arguments["others"],
        )


def _embeddings(prepared: PreparedGenerate, answer: Any) -> Embedding | list[Embedding]:
    results = whole_results("encode", [answer] if prepared.single else answer)
    rows = [{"embedding": r["pooled"], "meta_info": r["meta_info"]} for r in results]
    return rows[0] if prepared.single else rows
