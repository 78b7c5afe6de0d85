"""Prompts as rows of numbers in place of token ids: from whatever callers have them in to a message, and back.

A prompt of rows has token ids all the same, as places: bits made of its contents, which no one reads as tokens. So
lengths, positions and blocks are counted as for any prompt, and replicas are chosen as for any other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch

from ..errors import InvalidRequestError
from .commands import InputEmbeds

EmbedsDtype = Literal["float32", "bfloat16", "float16"]
_DTYPES: dict[EmbedsDtype, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def read_embeds(value: Any) -> tuple[list[InputEmbeds], bool]:
    """The rows of each prompt, and whether there is a list of prompts rather than one.

    value: (tokens, hidden) numbers of any library, one prompt; or a list of such, or three dimensions. Tensors of
    float32, bfloat16 and float16 are sent as they are, all else as float32.
    """
    if isinstance(value, InputEmbeds):
        return [_message(value, 0)], False
    dims = getattr(value, "ndim", None)
    if dims is None:
        if not isinstance(value, Sequence) or isinstance(value, (str, bytes)) or not value:
            raise _wrong(0, f"{type(value).__name__} {str(value)[:40]!r}")
        first = value[0]
        inner = first[0] if isinstance(first, Sequence) and first else None
        is_number = isinstance(inner, (int, float)) or getattr(inner, "ndim", None) == 0
        is_row = getattr(first, "ndim", None) == 1
        is_list = not is_number and not is_row
    else:
        is_list = dims == 3
    rows = list(value) if is_list else [value]
    return [_message(row, i) for i, row in enumerate(rows)], is_list


def _message(value: Any, i: int) -> InputEmbeds:
    if isinstance(value, InputEmbeds):
        if len(value.data) != _num_bytes(value):  # nobody is to make room for what a shape claims
            raise _wrong(i, f"{len(value.data)} bytes of {value.dtype} for shape {value.shape}")
        return value
    try:
        if isinstance(value, Sequence) and value and isinstance(value[0], torch.Tensor):
            value = torch.stack(list(value))
        if not isinstance(value, torch.Tensor):
            value = torch.from_numpy(np.array(value, np.float32))
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise _wrong(i, str(error)) from None
    if value.dim() != 2 or not value.numel():
        raise _wrong(i, f"shape {tuple(value.shape)}")
    if not value.dtype.is_floating_point:
        raise _wrong(i, f"{str(value.dtype).removeprefix('torch.')} numbers")
    name: EmbedsDtype = "float32"
    for known, dtype in _DTYPES.items():
        name = known if dtype == value.dtype else name
    try:
        rows = value.detach().to("cpu", _DTYPES[name]).contiguous().view(torch.uint8)
    except (RuntimeError, NotImplementedError) as error:  # a tensor without data, or a sparse one
        raise _wrong(i, f"a tensor that cannot be read ({str(error)[:80]})") from None
    return InputEmbeds(
        dtype=name,
        shape=(value.shape[0], value.shape[1]),
        data=rows.numpy().tobytes(),
    )


def _wrong(i: int, got: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"input_embeds of prompt {i}: got {got}, expected (tokens, hidden size) floating-point numbers with at least "
        "one row; pass what the model's embedding gives"
    )


def places_of(embeds: InputEmbeds) -> list[int]:
    """Token ids that hold the places of the rows: bits, which every vocabulary has."""
    digest = hashlib.sha256(embeds.data).digest()
    bits = [byte >> k & 1 for byte in digest for k in range(8)]
    num = embeds.shape[0]
    return (bits * (num // len(bits) + 1))[:num]


def identity_of(embeds: InputEmbeds) -> str:
    """Equal for the same rows alone, of which such a prompt shares cached prefixes."""
    return f"{embeds.dtype} {embeds.shape} {hashlib.sha256(embeds.data).hexdigest()}"


def check_embeds(embeds: InputEmbeds, num_tokens: int, hidden_size: int, what: str) -> None:
    """`InvalidRequestError` for rows that are not what they say they are, or not this model's."""
    num, width = embeds.shape
    expected = _num_bytes(embeds)
    if num != num_tokens or len(embeds.data) != expected:
        raise InvalidRequestError(
            f"{what}, input_embeds: got {len(embeds.data)} bytes for {num_tokens} tokens, expected {expected} for "
            f"{embeds.dtype} of shape {embeds.shape}; send the rows whole"
        )
    if width != hidden_size:
        raise InvalidRequestError(
            f"{what}, input_embeds: got rows of {width} numbers, expected the model's hidden size {hidden_size}; take "
            "them from this model's embedding"
        )
    if not rows_of(embeds).isfinite().all():
        raise InvalidRequestError(
            f"{what}, input_embeds: got numbers that are not finite, expected finite ones; look at what made them"
        )


def _num_bytes(embeds: InputEmbeds) -> int:
    num, width = embeds.shape
    return num * width * _DTYPES[embeds.dtype].itemsize


def rows_of(embeds: InputEmbeds) -> torch.Tensor:
    """(tokens, hidden) on the host."""
    flat = torch.frombuffer(bytearray(embeds.data), dtype=_DTYPES[embeds.dtype])
    return flat.view(embeds.shape)
