"""Prompts in whatever callers have them; what would be read wrongly is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rollout import Engine
from rollout.engine.prepare import prepare
from rollout.engine.prompts import prompt_token_ids
from rollout.errors import InvalidRequestError
from rollout.tokenizer import Tokenizer

PAD, BEGIN = 256, 257


def ids_of(input_ids: Any, **options: Any) -> Any:
    return prompt_token_ids(None, None, input_ids, pad_token_id=PAD, **options)


@pytest.mark.parametrize(
    "input_ids",
    [
        [np.int64(5), 9],
        np.array([5, 9]),
        torch.tensor([5, 9], dtype=torch.int32),
        [torch.tensor(5), torch.tensor(9)],
        (5, np.array(9)),
    ],
)
def test_whole_numbers_of_any_library_are_one_prompt(input_ids: Any) -> None:
    assert ids_of(input_ids) == ([[5, 9]], False)


@pytest.mark.parametrize(
    "input_ids",
    [
        [torch.tensor([5, 9]), [7]],
        [np.array([5, 9], dtype=np.uint16), (7,)],
        {"input_ids": [[PAD, 5, 9], [PAD, PAD, 7]], "attention_mask": [[0, 1, 1], [0, 0, 1]]},
    ],
)
def test_rows_may_be_anything_and_of_any_length(input_ids: Any) -> None:
    assert ids_of(input_ids) == ([[5, 9], [7]], True)


@pytest.mark.parametrize("rows", [[[PAD, 5], [7, 8]], [[5, 9], [7, PAD]]])
def test_a_padded_tensor_is_refused_unless_its_mask_comes_with_it(rows: list[list[int]]) -> None:
    for tensor in (torch.tensor(rows), np.array(rows)):
        with pytest.raises(InvalidRequestError, match=r"padding token 256.*attention_mask"):
            ids_of(tensor)
        whole = [[token for token in row if token != PAD] for row in rows]
        assert ids_of(tensor, attention_mask=tensor != PAD) == (whole, True)
    assert ids_of(rows) == (rows, True)  # A list is taken as it is: token in, token out.
    with pytest.raises(InvalidRequestError, match="another shape"):
        ids_of(torch.tensor(rows), attention_mask=torch.ones(2, 3))


@pytest.mark.parametrize(
    "input_ids",
    [
        *([1.0], [1, 2.5], 5, 2.5, "12", [True], [[1], 2], [[[1]]], [None], [[]]),
        *(torch.tensor([1.0]), torch.tensor(5), torch.tensor([True]), np.array([[0.5]]), {"a": 1}),
    ],
)
def test_what_is_no_token_id_is_a_value_error(input_ids: Any) -> None:
    with pytest.raises(InvalidRequestError, match="input_ids"):
        ids_of(input_ids)


def test_half_a_surrogate_pair_is_a_value_error(tiny_checkpoint: Callable[..., Path]) -> None:
    tokenizer = Tokenizer(tiny_checkpoint("qwen3", head_dim=32))
    with pytest.raises(InvalidRequestError, match="surrogate"):
        prompt_token_ids(tokenizer, ["fine", "\ud800"], None)


def test_templated_text_gets_no_second_begin_token(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    from tokenizers import processors

    tokenizer = Tokenizer(tiny_checkpoint("qwen3", head_dim=32))
    tokenizer.inner.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", BEGIN)]
    )
    plain = tokenizer.encode("the", add_special_tokens=False)
    assert tokenizer.encode("the") == [BEGIN, *plain]
    assert tokenizer.encode("<bos>the") == [BEGIN, *plain]
    assert tokenizer.encode("<bos>the", add_special_tokens=True) == [BEGIN, BEGIN, *plain]
    assert tokenizer.encode("<bos>the", add_special_tokens=False) == [BEGIN, *plain]
    assert prompt_token_ids(tokenizer, "the", None, add_special_tokens=False) == ([plain], False)


def test_a_result_says_that_the_context_ended_it(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint("qwen3", head_dim=32)
    params = {"temperature": 0.0, "ignore_eos": True}
    options: dict[str, Any] = {"context_length": 32, "kv_cache_bytes": 1 << 20}
    with Engine(folder, skip_tokenizer_init=True, **options) as engine:
        cut, whole = engine.generate(
            input_ids=[[7] * 28, [7] * 20],
            sampling_params=[{**params, "max_new_tokens": num} for num in (10, 12)],
        )
        assert len(cut["output_ids"]) == 4
        assert cut["meta_info"]["context_exhausted"] is True
        assert whole["meta_info"]["context_exhausted"] is False
        with pytest.raises(InvalidRequestError, match="padding"):
            engine.generate(input_ids=torch.tensor([[PAD, 5]]), sampling_params=params)


def test_a_tensor_without_data_is_a_value_error() -> None:
    with pytest.raises(InvalidRequestError, match="cannot be read"):
        ids_of(torch.empty(2, dtype=torch.int64, device="meta"))


@pytest.mark.parametrize(
    "rid", [7, ["a", "a"], ["a", ["b"]], [{"a": 1}, "b"], np.array(["a", "b"])]
)
def test_ids_of_requests_are_texts_one_for_each(rid: Any) -> None:
    with pytest.raises(InvalidRequestError, match="rid: got"):
        prepared(rid=rid)


def test_a_tensor_in_place_of_a_number_is_a_value_error() -> None:
    with pytest.raises(InvalidRequestError, match="prompt 0"):
        prepared(per_prompt={"top_logprobs_num": torch.tensor([1, 2])})


def prepared(rid: Any = None, per_prompt: dict[str, Any] | None = None) -> Any:
    columns = {"return_logprob": False, "top_logprobs_num": 0, "token_ids_logprob": None}
    return prepare(
        None,
        prompt=None,
        input_ids=[[1], [2]],
        sampling_params=None,
        stream=False,
        rid=rid,
        return_text_in_logprobs=False,
        per_prompt={**columns, **(per_prompt or {})},
        others={},
    )
