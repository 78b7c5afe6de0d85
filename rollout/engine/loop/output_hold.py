"""Tokens of a version that is not verified yet: kept back, then handed out, or undone as if never sampled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ...protocol.commands import SampleUpdate
from ...scheduling.request import Request
from .sample_state import GenerateGroup, SampleState


@dataclass(frozen=True, slots=True)
class _Mark:
    """How far a request was when the hold began."""

    num_tokens: int
    num_sent: int


class OutputHold:
    """From `hold_outputs` to `release_outputs` of one overlapped verification."""

    def __init__(self, groups: Mapping[int, GenerateGroup]) -> None:
        self.news: list[tuple[GenerateGroup, SampleUpdate | None]] = []
        """Updates and final answers that would have been sent, in order."""
        self._marks = {
            request: _Mark(len(request.token_ids), request.outputs.num_sent)
            for group in groups.values()
            for request in group.requests
            if not request.outputs.finished
        }

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
                    if state.finished and not self._ended_here(request):
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

    def _ended_here(self, request: Request) -> bool:
        return any(
            update is not None and update.rid == request.rid and update.finish_reason is not None
            for group, update in self.news
            if group is request.outputs.group
        )

    def kept_news(
        self, version: str, number: int
    ) -> list[tuple[GenerateGroup, SampleUpdate | None]]:
        """After `undo`: what is still to be told, which are the ends of aborted requests, without what was undone.

        `version`, `number`: what serves again.
        """
        news: list[tuple[GenerateGroup, SampleUpdate | None]] = []
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
            elif update.finish_reason is not None and update.finish_reason.type == "abort":
                request = aborted[group.number, update.rid]
                reason = update.finish_reason
                news.append((group, request.outputs.update(request, reason, version, number)))
        return news
