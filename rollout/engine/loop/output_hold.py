"""Tokens of a version that is not verified yet: kept back, then handed out, or undone as if never sampled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ...protocol.commands import SampleUpdate
from ...scheduling.request import Request
from .sample_state import GenerateGroup, SampleState

News = SampleUpdate | Exception | None
"""What a call is told: of a sample, that it has failed, or (None) that it is done."""


@dataclass(frozen=True, slots=True)
class _Mark:
    """How far a request was when the hold began."""

    num_tokens: int
    num_sent: int


class OutputHold:
    """From `hold_outputs` to `release_outputs` of one overlapped verification."""

    def __init__(self, groups: Mapping[int, GenerateGroup]) -> None:
        self.news: list[tuple[GenerateGroup, News]] = []
        """What would have been told, in order."""
        self._ended: dict[Request, None] = {}
        self._may_go_on: set[str] = set()  # ids of those that nobody has aborted
        self._marks = {
            request: _Mark(len(request.token_ids), request.outputs.num_sent)
            for group in groups.values()
            for request in group.requests
            if not request.outputs.finished
        }

    def ends(self, request: Request) -> None:
        """`request` has just ended, perhaps for its version alone."""
        self._ended[request] = None
        if not request.outputs.aborted:
            self._may_go_on.add(request.rid)

    def holds(self, rid: str) -> bool:
        """Whether a request of this id has ended, and goes on if its version is undone."""
        return rid in self._may_go_on

    def undo(self, groups: Mapping[int, GenerateGroup]) -> list[Request]:
        """Cut all outputs back to the mark, those of newer requests to their prompt.

        Returns the requests that had ended since and must be scheduled again; those that a caller aborted stay ended.

        The scheduler must have dropped the KV of all running requests before.
        """
        revived = []
        touched = {**groups, **{group.number: group for group, _ in self.news}}
        for group in touched.values():
            for request in group.requests:
                state: SampleState = request.outputs
                mark = self._marks.get(request)
                if mark is None:
                    if state.finished and request not in self._ended:
                        continue
                    mark = _Mark(request.num_prompt_tokens, 0)
                num_output = mark.num_tokens - request.num_prompt_tokens
                del request.token_ids[mark.num_tokens :]
                request.sampler_state = None
                if num_output == 0:
                    request.rewind_input_logprobs()
                state.cut(num_output, mark.num_sent)
                if state.aborted:
                    state.forget_inputs(request.logprob_position)
                if state.finished and not state.aborted:
                    state.finished = False
                    group.num_finished -= 1
                    revived.append(request)
        return revived

    def kept_news(self, version: str, number: int) -> list[tuple[GenerateGroup, News]]:
        """After `undo`: what is still to be told, which are the ends of aborted requests, without what was undone.

        `version`, `number`: what serves again.
        """
        news: list[tuple[GenerateGroup, News]] = []
        aborted = {
            (group.number, request.rid): request
            for group in {group.number: group for group, _ in self.news}.values()
            for request in group.requests
            if request.outputs.aborted
        }
        for group, update in self.news:
            if update is None:
                if group.num_finished == group.num_samples:
                    news.append((group, None))
            elif isinstance(update, Exception):
                continue  # it has failed for the version that is undone
            elif update.finish_reason is not None and update.finish_reason.type == "abort":
                request = aborted[group.number, update.rid]
                reason = update.finish_reason
                news.append((group, request.outputs.update(request, reason, version, number)))
        return news
