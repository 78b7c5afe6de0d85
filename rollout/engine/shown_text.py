"""The text of one sample as its caller sees it, growing or complete; special tokens and stop strings are left out."""

from __future__ import annotations

from collections.abc import Sequence

from ..detokenizer import IncrementalDetokenizer, whole_text
from ..protocol.commands import FinishReason
from ..sampling_params import SamplingParams
from ..tokenizer import REPLACEMENT, Tokenizer


class ShownText:
    """What is shown while a sample grows is a beginning of all that is shown later."""

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams) -> None:
        self._tokenizer = tokenizer
        self._trims = not params.no_stop_trim
        self._skip = params.skip_special_tokens
        self._spaces = params.spaces_between_special_tokens
        self._detokenizer: IncrementalDetokenizer | None = None
        self._num_tokens = 0
        self._before = ""  # the text of all tokens but the last
        self._piece = ""  # what the last one has added

    def so_far(self, output_ids: Sequence[int], text_end: tuple[int, int] | None) -> str:
        """The text of an unfinished output up to `text_end` (see `SampleUpdate`)."""
        if text_end is None or not self._trims:
            text_end = len(output_ids), 0
        return self._up_to(output_ids, text_end)

    def final(
        self,
        output_ids: Sequence[int],
        reason: FinishReason,
        text_end: tuple[int, int] | None,
    ) -> str:
        """The text of a finished output, up to `text_end` where a stop string begins."""
        if text_end is not None and self._trims:
            text = self._at_once(output_ids, text_end)
            if text is None:
                text = self._up_to(output_ids, text_end)
                if not self._piece and self._detokenizer is not None:  # it begins in a hidden token
                    text += self._detokenizer.rest
            return text
        if reason.type == "stop" and isinstance(reason.matched, int) and self._trims:
            output_ids = output_ids[:-1]
        if self._detokenizer is None:
            return whole_text(
                self._tokenizer, output_ids, skip_special_tokens=self._skip, spaces=self._spaces
            )
        return self._up_to(output_ids, (len(output_ids), 0)) + self._detokenizer.rest

    def _up_to(self, output_ids: Sequence[int], text_end: tuple[int, int]) -> str:
        if self._detokenizer is None:
            self._detokenizer = IncrementalDetokenizer(
                self._tokenizer, skip_special_tokens=self._skip, spaces=self._spaces
            )
        num_tokens, surplus = text_end
        for token in output_ids[self._num_tokens : num_tokens]:
            self._before += self._piece
            self._piece = self._detokenizer.add(token)
        self._num_tokens = num_tokens
        return self._before + self._piece[: max(0, len(self._piece) - surplus)]

    def _at_once(self, output_ids: Sequence[int], text_end: tuple[int, int]) -> str | None:
        """The same as `_up_to`, where every character is complete and nothing was shown before; else None."""
        if self._detokenizer is not None:
            return None
        num_tokens, surplus = text_end
        before, text = (
            self._tokenizer.decode(
                output_ids[:num], skip_special_tokens=self._skip, spaces=self._spaces
            )
            for num in (num_tokens - 1, num_tokens)
        )
        if REPLACEMENT in before or REPLACEMENT in text:
            return None
        return text[: max(len(before), len(text) - surplus)]
