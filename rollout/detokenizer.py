"""Text of a growing output, piece by piece: what is given is never taken back.

A token may end within a character, or begin with the rest of one, and some tokenizers look at neighbours. So new tokens
are decoded behind the last ones whose text is known, as serving engines do (prefix and read offsets), and what could
still change is held back: the replacement characters at the end, which may be bytes of a character to come.
"""

from __future__ import annotations

from collections.abc import Sequence

from .tokenizer import REPLACEMENT, Tokenizer

_MOST_BYTES = 3
"""Bytes of a character that is not complete; some tokenizers show each as a replacement character."""


class IncrementalDetokenizer:
    """Takes the tokens of one output in order, and gives its text in pieces."""

    def __init__(
        self, tokenizer: Tokenizer, *, skip_special_tokens: bool, spaces: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._spaces = spaces
        self._context: list[int] = []
        self._context_text = ""
        self._pending: list[int] = []
        self._num_given = 0
        self.rest = ""
        """What is held back: the end of the text, if no token comes any more."""

    def add(self, token: int) -> str:
        """The text that `token` decides; empty while it may be part of a character, or where it is hidden."""
        self._pending.append(token)
        text = self._text_of_pending()
        end = len(text)
        while end and len(text) - end < _MOST_BYTES and text[end - 1] == REPLACEMENT:
            end -= 1
        if end < len(text) or not text:
            if self._is_hidden(token):
                self._pending.pop()
                return ""
            piece = text[self._num_given : end]
            self._num_given = max(self._num_given, end)
        else:
            piece = text[self._num_given :]
            self._num_given = 0
            self._context, self._pending = self._pending, []
            self._context_text = self._decode(self._context)
        self.rest = text[end:]
        return piece

    def _text_of_pending(self) -> str:
        if self._context:
            text = self._decode([*self._context, *self._pending])
            if text.startswith(self._context_text):
                return text[len(self._context_text) :]
        # Bytes of which one that is wrong spoils its neighbours (byte fallback), or the first tokens.
        return self._decode(self._pending)

    def _is_hidden(self, token: int) -> bool:
        if not self._skip or self._decode([token]):
            return False
        return bool(self._tokenizer.decode([token], skip_special_tokens=False))

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(
            token_ids, skip_special_tokens=self._skip, spaces=self._spaces
        )


def whole_text(
    tokenizer: Tokenizer,
    token_ids: Sequence[int],
    *,
    skip_special_tokens: bool,
    spaces: bool = True,
) -> str:
    """What an `IncrementalDetokenizer` gives for a complete output, `rest` included; at once where that is the same."""
    text = tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens, spaces=spaces)
    if REPLACEMENT not in text or not tokenizer.has_byte_fallback:
        return text
    detokenizer = IncrementalDetokenizer(
        tokenizer, skip_special_tokens=skip_special_tokens, spaces=spaces
    )
    return "".join(map(detokenizer.add, token_ids)) + detokenizer.rest
