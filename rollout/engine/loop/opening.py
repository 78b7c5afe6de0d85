"""Samples of a call that are not requests yet: they become some in pieces, so that a huge call holds nobody up.

Between two steps at most `PIECE` samples are made, and only while few requests wait; the rest costs no memory. All of
it is a function of the order of commands and steps, so the ranks make the same requests at the same time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from ...protocol.commands import PromptSpec
from ...scheduling.request import Request

PIECE = 256
"""Samples that are made between two steps."""
BACKLOG = 1024
"""Waiting requests from which on no more are made."""


@dataclass(slots=True, eq=False)
class SentPrompt:
    """One prompt as it was sent."""

    spec: PromptSpec
    """What to run."""
    first: int
    """Index of its first sample in the call."""
    number: int
    """How many prompts came before it, of all calls."""
    done: int = 0
    """How many of its samples are requests."""

    def rid(self, sample: int) -> str:
        """Id of one of its samples."""
        return f"{self.spec.rid}-{sample}" if self.spec.params.n > 1 else self.spec.rid

    def waits(self, rid: str) -> range:
        """Which of its samples go by the name of `rid`, itself or one of them, and are no requests yet."""
        left = range(self.done, self.spec.params.n)
        if rid == self.spec.rid:
            return left
        base, _, sample = rid.rpartition("-")
        if base != self.spec.rid or self.spec.params.n == 1 or not sample.isdecimal():
            return range(0)
        index = int(sample)
        return range(index, index + 1) if index in left and self.rid(index) == rid else range(0)


MakeRequests = Callable[[SentPrompt, int, Request | None], list[Request]]
"""`make(part, count, twin)`: the next `count` requests of a part; `twin` is an earlier one of an equal prompt."""


class Opening:
    """What is left of one call; used on the engine loop's thread alone."""

    def __init__(self, prompts: Iterable[list[SentPrompt]], make: MakeRequests) -> None:
        """`prompts`: for each distinct prompt, the parts that ask for it."""
        self._prompts = deque(deque(parts) for parts in prompts)
        self._make = make
        self._twin: Request | None = None
        self._ended: dict[str, str] = {}  # by the id of the sample
        self._all_ended: str | None = None
        self.num_left = sum(part.spec.params.n for parts in self._prompts for part in parts)
        """Samples that are no requests yet."""

    def take(self, limit: int) -> list[Request]:
        """The next requests, at most `limit`, all of one prompt; empty: there are none left."""
        requests: list[Request] = []
        while self._prompts and len(requests) < limit:
            parts = self._prompts[0]
            part = parts[0]
            count = min(limit - len(requests), part.spec.params.n - part.done)
            made = self._make(part, count, self._twin)
            part.done += count
            requests += made
            self._twin = requests[0]
            if part.done == part.spec.params.n:
                parts.popleft()
            if not parts:
                self._prompts.popleft()
                self._twin = None
                break
        self.num_left -= len(requests)
        return requests

    def end(self, message: str, rids: Collection[str] | None = None) -> int:
        """Whatever goes by one of `rids` (None: all) ends as soon as it is made; returns how many samples."""
        if self._all_ended is not None:
            return 0
        if rids is None:
            self._all_ended = message
            return self.num_left - len(self._ended)
        found = [
            part.rid(sample) for part in self._parts for rid in rids for sample in part.waits(rid)
        ]
        fresh = {rid: message for rid in found if rid not in self._ended}
        self._ended.update(fresh)
        return len(fresh)

    @property
    def over(self) -> bool:
        """All that is left ends as soon as it is made."""
        return self._all_ended is not None or len(self._ended) == self.num_left

    def why_ended(self, request: Request) -> str | None:
        """The message with which a request that was made just now ends; None: it runs."""
        return self._ended.pop(request.rid, None) or self._all_ended

    def holds(self, rid: str) -> bool:
        """Whether a sample of this id is still to be made."""
        return any(
            part.rid(sample) == rid for part in self._parts for sample in part.waits(rid)[:1]
        )

    @property
    def _parts(self) -> list[SentPrompt]:
        return [part for parts in self._prompts for part in parts]
