"""How many tokens a text has at least, without encoding it: what is far too long is refused before any work.

Every token covers some bytes of the text, and no more than the vocabulary's longest one. If each byte of the text
weighs 1 / (bytes of the longest token that has such a byte), the bytes that one token covers weigh at most 1 together,
so the weight of a text is at most its number of tokens. That holds for tokenizers that drop nothing: what is not known
to drop nothing has no bound.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

_SPACE = "\u2581"
"""What tokenizers in the way of sentencepiece write for a space."""
_COMPOSED = 1.5
"""Code points that Unicode's normal forms make into one byte, at most. None of them changes an ASCII character that
another one, or the end, follows."""
_NORMAL_FORMS = ("NFC", "NFD", "NFKC", "NFKD")
_NEVER_IN_UTF8 = {0xC0, 0xC1, *range(0xF5, 0x100)}
_SAFETY = 1e-9
"""Relative, and far more than what rounding may add to a sum of 256 products."""


class TokenBound:
    """Of one tokenizer."""

    def __init__(
        self, weights: np.ndarray, *, skips_space: bool, composes: bool, space: bool
    ) -> None:
        """weights: [256], of each byte. skips_space: a token may take any amount of white space beside it. composes:
        the text is brought to a normal form. space: tokens say U+2581 for a space."""
        self._weights = weights
        self._skips_space = skips_space
        self._composes = composes
        self._space = space

    def least(self, text: str) -> int:
        """At most the number of tokens of `text`, which has no surrogates; special tokens around it not counted."""
        if self._skips_space:
            text = "".join(text.split())
        if self._space:
            text = text.replace(_SPACE, " ")
        content = np.frombuffer(text.encode(), dtype=np.uint8)
        if not self._composes or text.isascii():
            return self._rounded(self._weight(content))
        is_ascii = content < 0x80
        stays = is_ascii & np.append(is_ascii[1:], True)
        changing = content[~stays]
        num_characters = np.count_nonzero(changing & 0xC0 != 0x80)
        least = num_characters / _COMPOSED * self._weights.min()
        return self._rounded(self._weight(content[stays]) + float(least))

    def _weight(self, content: np.ndarray) -> float:
        return float(np.bincount(content, minlength=256) @ self._weights)

    @staticmethod
    def _rounded(weight: float) -> int:
        return math.ceil(weight * (1.0 - _SAFETY) - _SAFETY)


def bound_of(backend: Any) -> TokenBound | None:
    """That of a `tokenizers.Tokenizer`; None where it may drop text without limit, or does what is not known here."""
    spec = json.loads(backend.to_str())
    model, added = spec["model"], spec["added_tokens"]
    if model.get("type") != "BPE" or spec.get("truncation") is not None:
        return None
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return None
    normalizers, splitters = _steps(spec["normalizer"]), _steps(spec["pre_tokenizer"])
    by_bytes = any(step["type"] == "ByteLevel" for step in splitters)
    if not all(_keeps(step, by_bytes) for step in normalizers):
        return None
    if not all(_splits(step, by_bytes) for step in splitters):
        return None
    contents = [token["content"] for token in added]
    if backend.normalizer is not None:  # Some are looked for in what it makes of them.
        contents += [backend.normalizer.normalize_str(text) for text in contents]
    weights = (_of_bytes if by_bytes else _of_text)(model, contents)
    if weights is None:
        return None
    return TokenBound(
        weights,
        skips_space=any(token["lstrip"] or token["rstrip"] for token in added),
        composes=any(step["type"] in _NORMAL_FORMS for step in normalizers),
        space=not by_bytes,
    )


def _steps(step: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """A normalizer or pre-tokenizer as a flat list."""
    if step is None:
        return []
    if step["type"] != "Sequence":
        return [step]
    return [
        leaf
        for name in ("normalizers", "pretokenizers")
        for part in step.get(name, ())
        for leaf in _steps(part)
    ]


def _keeps(step: Mapping[str, Any], by_bytes: bool) -> bool:
    """The normalizer only adds, composes, or writes spaces in another way."""
    if step["type"] == "Replace":
        written = (step["pattern"].get("String"), step["content"])
        return not by_bytes and written in ((" ", _SPACE), (_SPACE, " "))
    return step["type"] in (*_NORMAL_FORMS, "Prepend")


def _splits(step: Mapping[str, Any], by_bytes: bool) -> bool:
    """The pre-tokenizer drops nothing."""
    if step["type"] in ("Split", "Punctuation"):
        return bool(step["behavior"] != "Removed")
    if step["type"] == "Metaspace":
        return not by_bytes and step["replacement"] == _SPACE
    return step["type"] in ("ByteLevel", "Digits", "UnicodeScripts")


def _of_bytes(model: Mapping[str, Any], added: Iterable[str]) -> np.ndarray | None:
    """Weights where tokens are strings of bytes, each written as a letter; None unless each byte is a token."""
    byte_of = _bytes_of_letters()
    vocabulary = model["vocab"]
    alone = {byte_of.get(name) for name in vocabulary if len(name) == 1}
    if not set(range(256)) - _NEVER_IN_UTF8 <= alone:
        return None
    tokens = {text.encode() for text in added}
    for name in vocabulary:
        if byte_of.keys() >= set(name):  # else only an added token can be meant
            tokens.add(bytes(byte_of[letter] for letter in name))
    longest = np.ones(256)
    for token in sorted(tokens, key=len):
        longest[np.frombuffer(token, dtype=np.uint8)] = len(token)
    return 1.0 / longest


def _bytes_of_letters() -> dict[str, int]:
    """The byte that each letter of a byte-level vocabulary stands for, as GPT-2 defines it."""
    shown = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(b): b for b in shown} | {chr(256 + i): b for i, b in enumerate(hidden)}


def _of_text(model: Mapping[str, Any], added: Iterable[str]) -> np.ndarray | None:
    """Weights where tokens are text, and what the vocabulary lacks becomes bytes; None unless each byte is a token."""
    vocabulary = model["vocab"]
    if not model.get("byte_fallback") or any(f"<0x{b:02X}>" not in vocabulary for b in range(256)):
        return None
    # All the same: a token that was merged of single bytes does not show which ones.
    longest = max(len(name.replace(_SPACE, " ").encode()) for name in (*vocabulary, *added))
    return np.full(256, 1.0 / longest)
