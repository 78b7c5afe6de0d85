"""Stop strings in a growing output: which one ends it, and which text may be shown before that is known."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from .detokenizer import IncrementalDetokenizer
from .tokenizer import Tokenizer

TextEnd = tuple[int, int]
"""Where a text ends: after so many output tokens, less so many characters of the last of these."""


@dataclass(frozen=True, slots=True)
class StopMatch:
    """A stop string that an output contains."""

    stop: str
    """Which one."""
    text_end: TextEnd
    """Where it begins."""


class StopStringWatcher:
    """Looks for stop strings in one output, in its text with all special tokens.

    A stop string counts when a token after the first `min_new_tokens` completes it. Of several that the same token
    completes, the one that begins first wins, or else the first of `stops`. The cost of a token does not grow with the
    output.
    """

    def __init__(
        self, tokenizer: Tokenizer, stops: Sequence[str], *, min_new_tokens: int = 0
    ) -> None:
        self._tokenizer = tokenizer
        self._stops = tuple(stops)
        self._min_new_tokens = min_new_tokens
        self._kept = max(map(len, stops)) - 1
        self.restart()

    def restart(self) -> None:
        """Forget all tokens: some were taken back."""
        self._detokenizer = IncrementalDetokenizer(
            self._tokenizer, skip_special_tokens=False, spaces=False
        )
        self.num_tokens = 0
        """Output tokens that it has seen."""
        self._tail = ""  # the last characters of the text, of which the first is number `_offset`
        self._offset = 0
        self._ends: deque[TextEnd] = (
            deque()
        )  # (tokens, characters up to their end), within the tail

    def add(self, token: int) -> StopMatch | None:
        """The stop string that `token`, the next one of the output, completes."""
        piece = self._detokenizer.add(token)
        self.num_tokens += 1
        if not piece:
            return None
        searched = len(self._tail)
        self._tail += piece
        self._ends.append((self.num_tokens, self._offset + len(self._tail)))
        if self.num_tokens > self._min_new_tokens:
            found = [
                (at, i)
                for i, stop in enumerate(self._stops)
                if (at := self._tail.find(stop, max(0, searched + 1 - len(stop)))) >= 0
            ]
            if found:
                at, i = min(found)
                return StopMatch(self._stops[i], self._end_before(at))
        self._forget()
        return None

    @property
    def held(self) -> TextEnd | None:
        """Where the text begins that may turn out to be the beginning of a stop string; None: there is none."""
        tail, first = self._tail, len(self._tail)
        for stop in self._stops:
            at = tail.find(stop[0], max(0, len(tail) + 1 - len(stop)))
            while 0 <= at < first:
                if stop.startswith(tail[at:]):
                    first = at
                at = tail.find(stop[0], at + 1)
        return None if first == len(tail) else self._end_before(first)

    def _end_before(self, at: int) -> TextEnd:
        position = self._offset + at
        num_tokens, end = next(entry for entry in self._ends if entry[1] > position)
        return num_tokens, end - position

    def _forget(self) -> None:
        surplus = len(self._tail) - self._kept
        if surplus > 0:
            self._tail = self._tail[surplus:]
            self._offset += surplus
            while self._ends and self._ends[0][1] <= self._offset:
                self._ends.popleft()
