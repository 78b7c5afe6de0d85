"""What the engine loop remembers of a sample's output: log-probabilities, version spans, times, and when to stop.

`Request.outputs` holds a `SampleState`. The scheduler never looks inside.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from ...protocol.commands import (
    FinishReason,
    PromptSpec,
    RoutedExperts,
    SampleUpdate,
    Span,
    TopLogprobs,
)
from ...scheduling.request import Request
from ...stop_strings import StopMatch, StopStringWatcher
from .opening import Opening


class ReplyChannel(Protocol):
    """Where the news of a `Generate` goes: to a caller in this process, or over the wire."""

    def stream(self, body: SampleUpdate) -> None: ...
    def fail(self, error: BaseException) -> None: ...


@dataclass(slots=True)
class InputLogprobs:
    """Log-probabilities of a prompt's own tokens, computed once and shared by its n samples.

    Lists are indexed by position - `start`; a position is None until it is computed, and for ever at position 0.
    """

    start: int
    tokens: list[int]
    values: list[float | None]
    top: list[TopLogprobs | None]
    selected: list[TopLogprobs | None]

    @classmethod
    def for_prompt(cls, prompt: list[int], start: int) -> InputLogprobs:
        num = max(0, len(prompt) - start)
        return cls(start, prompt[start:], [None] * num, [None] * num, [None] * num)


@dataclass(slots=True, eq=False)
class GenerateGroup:
    """One `Generate` command under way: it is done when all its samples are."""

    number: int
    channel: ReplyChannel
    finish: Callable[[int], None]
    stream: bool
    deadline: float
    num_samples: int
    engine_id: str = ""
    """Which life of an engine it runs in."""
    min_version: int = 0
    """The oldest version that may compute it."""
    held: bool = False
    """Nothing of it is computed yet, because no such version serves."""
    num_finished: int = 0
    requests: dict[Request, None] = field(default_factory=dict)
    """Those that are made and not finished, in order; while outputs are held, also those that finished since."""
    opening: Opening | None = None
    """Samples that are no requests yet; None: there are none."""


@dataclass(slots=True)
class SampleState:
    """Output side of one request."""

    group: GenerateGroup
    spec: PromptSpec
    index: int
    stop_ids: frozenset[int]
    watcher: StopStringWatcher | None
    inputs: InputLogprobs | None
    arrival: float = field(default_factory=time.perf_counter)
    logprobs: list[float] = field(default_factory=list)
    top: list[TopLogprobs] = field(default_factory=list)
    selected: list[TopLogprobs] = field(default_factory=list)
    token_times: list[float] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    pooled: list[float] | None = None
    routed: RoutedExperts | None = None
    kept_routes: Any = None
    """What `RouteReader` has of blocks that are given back."""
    stop_match: StopMatch | None = None
    """The stop string that ended it."""
    num_sent: int = 0
    finished: bool = False
    aborted: bool = False

    def cut(self, num_output: int, num_sent: int) -> None:
        """Forget everything about output tokens from number `num_output` on."""
        for column in (self.logprobs, self.top, self.selected, self.token_times):
            del column[num_output:]
        self.spans = [
            Span(span.version, span.start, min(span.end, num_output), span.number)
            for span in self.spans
            if span.start < num_output
        ]
        self.num_sent = num_sent
        self.stop_match = None
        if self.watcher is not None:
            self.watcher.restart()

    def forget_inputs(self, first: int) -> None:
        """Forget log-probabilities of prompt positions behind `first`, and which experts tokens went to: nothing will
        compute them again."""
        if self.inputs is not None:
            start = max(0, first + 1 - self.inputs.start)
            for column in (self.inputs.values, self.inputs.top, self.inputs.selected):
                column[start:] = [None] * len(column[start:])
        if self.routed is not None:
            self.routed = RoutedExperts(shape=(0, *self.routed.shape[1:]), data=b"")

    def note_token(self, position: int, version: str, number: int) -> None:
        """Record that output token number `position` was sampled by `version`; one label may name two versions."""
        spans = self.spans
        if spans and (spans[-1].number, spans[-1].version) == (number, version):
            spans[-1] = Span(version, spans[-1].start, position + 1, number)
        else:
            spans.append(Span(version, position, position + 1, number))

    def finish_reason(self, request: Request) -> FinishReason | None:
        """Why `request` ends with the token appended last; None: it goes on."""
        num_output = request.num_output_tokens
        params = request.params
        last = request.token_ids[-1]
        match = self._stop_match(request)
        if last in self.stop_ids and num_output > params.min_new_tokens:
            if (
                match is None or match.text_end[0] == num_output
            ):  # no text before it is to be left out
                return FinishReason(type="stop", matched=last)
        if match is not None:
            self.stop_match = match
            return FinishReason(type="stop", matched=match.stop)
        if num_output >= params.max_new_tokens:
            return FinishReason(type="length", length=num_output)
        return None

    def _stop_match(self, request: Request) -> StopMatch | None:
        watcher, match = self.watcher, None
        if watcher is not None:
            for token in request.token_ids[request.num_prompt_tokens + watcher.num_tokens :]:
                match = watcher.add(token)
        return match

    def _text_end(self, reason: FinishReason | None) -> tuple[int, int] | None:
        if self.stop_match is not None:
            return self.stop_match.text_end
        return self.watcher.held if self.watcher is not None and reason is None else None

    def update(
        self, request: Request, reason: FinishReason | None, version: str, number: int
    ) -> SampleUpdate:
        """What is new since the last update; everything, when this is the first one."""
        sent, spec = self.num_sent, self.spec
        output_ids = request.output_ids[sent:]
        self.num_sent = sent + len(output_ids)
        spans = self.spans or [Span(version, 0, 0, number)]
        wants_top, wants_ids = spec.top_logprobs_num > 0, spec.token_ids_logprob is not None
        inputs = self.inputs if sent == 0 else None
        return SampleUpdate(
            index=self.index,
            rid=request.rid,
            output_ids=output_ids,
            finish_reason=reason,
            text_end=self._text_end(reason),
            prompt_tokens=request.num_prompt_tokens,
            cached_tokens=request.num_cached_tokens,
            weight_version=version,
            weight_version_number=number,
            weight_versions=list(spans),
            output_logprobs=self.logprobs[sent:] if spec.return_logprob else None,
            output_top_logprobs=self.top[sent:] if wants_top else None,
            output_ids_logprobs=self.selected[sent:] if wants_ids else None,
            input_logprobs=list(zip(inputs.values, inputs.tokens, strict=True)) if inputs else None,
            input_top_logprobs=inputs.top if inputs and wants_top else None,
            input_ids_logprobs=inputs.selected if inputs and wants_ids else None,
            pooled=self.pooled,
            routed_experts=self.routed if reason is not None else None,
            token_times=self.token_times[sent:] if spec.return_token_times else None,
            e2e_latency=time.perf_counter() - self.arrival,
            num_retractions=request.num_retractions,
            engine_id=self.group.engine_id,
        )
