"""Token ids of prompts, from whatever callers have them in; what is no prompt is refused with the way out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import InvalidRequestError
from ..tokenizer import Tokenizer, encode_prompts


def prompt_token_ids(
    tokenizer: Tokenizer | None,
    prompt: Any,
    input_ids: Any,
    *,
    attention_mask: Any = None,
    add_special_tokens: bool | None = None,
    pad_token_id: int | None = None,
) -> tuple[list[list[int]], bool]:
    """The ids of each prompt, and whether there is a list of them rather than one.

    `input_ids`: whole numbers of any library, one row or several of any lengths; also what a tokenizer of transformers
    returns. With `attention_mask` (the same shape) only positions where it is 1 count. A 2-D tensor whose rows begin or
    end with `pad_token_id` is refused: padding would be read as part of the prompt.
    """
    if (prompt is None) == (input_ids is None):
        got = "both" if prompt is not None else "neither"
        raise InvalidRequestError(f"got {got} of prompt and input_ids, expected exactly one")
    if prompt is not None:
        is_list = isinstance(prompt, (list, tuple))
        texts = list(prompt) if is_list else [prompt]
        return encode_prompts(tokenizer, texts, add_special_tokens), is_list
    if isinstance(input_ids, Mapping) and "input_ids" in input_ids:
        if attention_mask is None:
            attention_mask = input_ids.get("attention_mask")
        input_ids = input_ids["input_ids"]
    is_matrix = getattr(input_ids, "ndim", 0) == 2
    ids = _plain(input_ids)
    if not isinstance(ids, list) or not ids:
        raise InvalidRequestError(
            f"input_ids: got {type(input_ids).__name__} {str(input_ids)[:40]!r}, expected a list of token ids, or a "
            "list of such lists, with at least one entry"
        )
    is_list = isinstance(ids[0], list)
    rows = ids if is_list else [ids]
    if attention_mask is not None:
        rows = _unpadded(rows, attention_mask, is_list)
    elif is_matrix and pad_token_id is not None:
        _check_unpadded(rows, pad_token_id)
    return [_checked_row(row, i) for i, row in enumerate(rows)], is_list


def _plain(value: Any) -> Any:
    """Tensors, arrays and numbers of any library as lists and numbers of Python."""
    if hasattr(value, "tolist"):
        try:
            return value.tolist()
        except RuntimeError as error:  # a tensor without data
            raise InvalidRequestError(
                f"input_ids: got a tensor that cannot be read ({error}), expected token ids"
            ) from None
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [item if type(item) is int else _plain(item) for item in value]
    return value


def _unpadded(rows: list[Any], mask: Any, is_list: bool) -> list[list[int]]:
    kept = _plain(mask)
    masks = kept if is_list else [kept]
    if not isinstance(masks, list) or [_size(row) for row in rows] != [_size(row) for row in masks]:
        raise InvalidRequestError(
            "attention_mask: got another shape than that of input_ids, expected one entry for each token; pass both as "
            "the tokenizer returned them"
        )
    return [
        [token for token, keep in zip(row, keeps, strict=True) if keep]
        for row, keeps in zip(rows, masks, strict=True)
    ]


def _size(row: Any) -> int:
    return len(row) if isinstance(row, list) else -1


def _check_unpadded(rows: list[list[Any]], pad_token_id: int) -> None:
    for i, row in enumerate(rows):
        if row and pad_token_id in (row[0], row[-1]):
            where = "begins" if row[0] == pad_token_id else "ends"
            raise InvalidRequestError(
                f"input_ids: got a 2-D tensor whose row {i} {where} with the padding token {pad_token_id}, expected "
                "prompts without padding; pass attention_mask=... as the tokenizer returned it, or a list with the ids "
                "of each prompt"
            )


def _checked_row(row: Any, i: int) -> list[int]:
    if not isinstance(row, list):
        raise InvalidRequestError(
            f"input_ids of prompt {i}: got {row!r} ({type(row).__name__}), expected a list of token ids"
        )
    for token in row:
        if type(token) is not int or not 0 <= token < 1 << 31:
            raise InvalidRequestError(
                f"input_ids of prompt {i}: got {token!r} ({type(token).__name__}), expected token ids: whole numbers "
                "of at least 0"
            )
    if not row:
        raise InvalidRequestError(f"input_ids of prompt {i}: got no tokens, expected at least one")
    return row
