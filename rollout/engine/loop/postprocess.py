"""What follows the forward of a step: draw tokens, note log-probabilities, finish samples, send the news."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch

from ...layers.sampler import (
    PendingSample,
    SampleOutput,
    Sampler,
    TokenSampler,
    non_finite,
)
from ...layers.scores import Asked, PendingScores
from ...layers.to_host import ToHost
from ...protocol.commands import FinishReason
from ...runner.attention_backend import DrawnTokens
from ...runner.model_runner import LaunchedStep, ModelRunner
from ...scheduling.batch import SampleRow, ScheduledBatch
from ...scheduling.request import PENDING, Request
from ...scheduling.scheduler import Scheduler
from .expert_routes import RouteReader
from .output_hold import News, OutputHold
from .sample_state import GenerateGroup, SampleState

LOGITS_BYTES = 64 << 20
"""Prompt log-probabilities are computed in pieces of so many rows that float32 logits have at most this many bytes."""


@dataclass(frozen=True, slots=True)
class DrawnPart:
    """What one call of the sampler drew."""

    requests: list[Request]
    """Who drew; their last token is `PENDING` until it is taken in."""
    rows: list[int]
    """Where in the sample each one's token is."""
    sample: PendingSample
    """Tokens and log-probabilities, perhaps not computed yet."""
    scores: PendingScores | None
    """Extra log-probabilities, by position in `requests`; None: nobody asked."""


@dataclass(frozen=True, slots=True)
class Flight:
    """A step that is launched, and not taken in."""

    batch: ScheduledBatch
    """What it computes."""
    version: str
    """Label of the weights that compute it."""
    number: int
    """Their number."""
    undrawn: list[Request]
    """Requests that wanted no token; they end with it."""
    parts: list[DrawnPart]
    """What it draws."""
    inputs: list[tuple[list[tuple[Request, int]], PendingScores]] = field(default_factory=list)
    """Log-probabilities of prompts: whose, after which of its positions, and the scores, perhaps not computed yet."""
    pooled: list[tuple[list[SampleState], ToHost]] = field(default_factory=list)
    """What is wanted of last positions: whose, and a vector for each, perhaps not computed yet."""
    tokens: list[torch.Tensor] = field(default_factory=list)
    """Of each part, the drawn tokens on the device; empty where one sampler's buffer holds them all."""

    def drawn(self, sampler: TokenSampler) -> DrawnTokens | None:
        """The tokens for the step that comes next."""
        if not self.parts:
            return None
        if len(self.parts) == 1:
            [part] = self.parts
            rows = dict(zip(part.requests, part.rows, strict=True))
            return DrawnTokens(sampler.tokens, rows)
        requests = [request for part in self.parts for request in part.requests]
        return DrawnTokens(torch.cat(self.tokens), {r: i for i, r in enumerate(requests)})


class Postprocessor:
    """Owns the output side of all requests under way; used on the engine loop's thread alone."""

    def __init__(self, scheduler: Scheduler, runner: ModelRunner, sampler: TokenSampler) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._sampler = sampler
        self._routes = RouteReader(scheduler, runner.kv_pool)
        row_bytes = 4 * runner.model_config.vocab_size
        self._max_logit_rows = max(1, LOGITS_BYTES // row_bytes)
        self._max_rows = self._max_logit_rows if isinstance(sampler, Sampler) else 1 << 20
        self.groups: dict[int, GenerateGroup] = {}
        """Calls under way by number, in the order of their arrival: what is done to all of them has an order."""
        self.version = ""
        """Label of the weights that compute the next step."""
        self.number = 0
        """Their number."""
        self._hold: OutputHold | None = None

    # ---- tokens ------------------------------------------------------------------------------------------------------

    def _score_inputs(self, flight: Flight, hidden: torch.Tensor) -> None:
        """Start to score the prompt tokens that this batch's logits give; position p gives token p + 1."""
        rows, owners, offset = [], [], 0
        for item in flight.batch.items:
            if item.input_logprobs is not None:
                rows += [offset + position - item.start for position in item.input_logprobs]
                owners += [(item.request, position) for position in item.input_logprobs]
            offset += item.length
        for first in range(0, len(rows), self._max_logit_rows):
            piece = slice(first, first + self._max_logit_rows)
            picked = hidden.index_select(0, self._runner.index(rows[piece]))
            asked = [
                Asked(
                    tokens=(request.token_ids[position + 1], *request.token_ids_logprob),
                    num_top=request.top_logprobs_num,
                )
                for request, position in owners[piece]
            ]
            scores = self._sampler.score(self._runner.sampling_logits(picked), asked)
            flight.inputs.append((owners[piece], scores))

    @staticmethod
    def _take_in_inputs(owners: Sequence[tuple[Request, int]], scores: PendingScores) -> None:
        for (request, position), found in zip(owners, scores.result(), strict=True):
            inputs = request.outputs.inputs
            index = position + 1 - inputs.start
            if index < 0:
                continue
            inputs.values[index] = found.given[0]
            if request.top_logprobs_num:
                inputs.top[index] = found.top
            if request.token_ids_logprob:
                wanted = request.token_ids_logprob
                inputs.selected[index] = list(zip(found.given[1:], wanted, strict=True))

    def sample(
        self, batch: ScheduledBatch, launched: LaunchedStep, rows: Sequence[SampleRow]
    ) -> Flight:
        """Draw a token for every request whose known tokens are all computed; `land` takes them in."""
        undrawn = [row.request for row in rows if not row.draws]
        flight = Flight(batch, self.version, self.number, undrawn, [])
        drawing = [row for row in rows if row.draws]
        if launched.logits is not None:
            self._draw_decoded(flight, launched, drawing)
            return flight
        assert launched.hidden is not None
        last_rows, offset = [], 0
        for item in batch.items:
            offset += item.length
            last_rows.append(offset - 1)
        self._score_inputs(flight, launched.hidden)
        self._pool(flight, launched.hidden, rows, last_rows)
        for first in range(0, len(drawing), self._max_rows):
            piece = drawing[first : first + self._max_rows]
            # Samples of one prompt draw their first token from one row of logits.
            items = list(dict.fromkeys(row.item_index for row in piece))
            picked = self._runner.index([last_rows[item] for item in items])
            logits = self._runner.sampling_logits(launched.hidden.index_select(0, picked))
            requests = [row.request for row in piece]
            if len(items) == len(piece):
                self._draw(flight, logits, requests, None)
            else:
                place = {item: i for i, item in enumerate(items)}
                self._draw(flight, logits, requests, [place[row.item_index] for row in piece])
        return flight

    def _pool(
        self,
        flight: Flight,
        hidden: torch.Tensor,
        rows: Sequence[SampleRow],
        last_rows: Sequence[int],
    ) -> None:
        """Start to compute what requests without tokens want of their last position."""
        for kind in ("score", "embedding"):
            wanted = [
                row for row in rows if not row.draws and row.request.outputs.spec.pooling == kind
            ]
            if not wanted:
                continue
            picked = self._runner.index([last_rows[row.item_index] for row in wanted])
            states = hidden.index_select(0, picked)
            vectors = self._runner.compute_logits(states) if kind == "score" else states.float()
            owners = [row.request.outputs for row in wanted]
            flight.pooled.append((owners, ToHost(vectors)))

    def _draw_decoded(
        self, flight: Flight, launched: LaunchedStep, drawing: Sequence[SampleRow]
    ) -> None:
        """The step computed a row of logits for every item, and may have drawn from each."""
        if not drawing:
            return
        requests, rows = [row.request for row in drawing], [row.item_index for row in drawing]
        if launched.sample is None:
            assert launched.logits is not None
            self._draw(flight, launched.logits, requests, rows)
            return
        flight.parts.append(DrawnPart(requests, rows, launched.sample, None))
        for request in requests:
            self._scheduler.append_token(request, PENDING)

    def _draw(
        self,
        flight: Flight,
        logits: torch.Tensor,
        requests: list[Request],
        shared: Sequence[int] | None,
    ) -> None:
        sample = self._sampler.launch(logits, requests, shared)
        scores = None
        if any(request.top_logprobs_num or request.token_ids_logprob for request in requests):
            asked = [
                Asked(r.token_ids_logprob, r.top_logprobs_num, r.params.logprob_temperature)
                for r in requests
            ]
            scores = self._sampler.score(logits, asked, shared)
        rows = list(range(len(requests)))
        flight.parts.append(DrawnPart(requests, rows, sample, scores))
        flight.tokens.append(self._sampler.tokens)
        for request in requests:
            self._scheduler.append_token(request, PENDING)

    def land(self, flight: Flight) -> None:
        """Take in the tokens of a step, and finish those that end with it. Waits until the step is computed."""
        for owners, scores in flight.inputs:
            self._take_in_inputs(owners, scores)
        for states, vectors in flight.pooled:
            for state, vector in zip(states, vectors.result().tolist(), strict=True):
                state.pooled = vector
        for request in flight.undrawn:
            if not request.outputs.finished:
                self._finish(request, FinishReason(type="length", length=0))
        for part in flight.parts:
            output = part.sample.result()
            bad = set(output.bad).intersection(part.rows) if output.bad else ()
            if bad:
                place = {row: i for i, row in enumerate(part.rows)}
                error = non_finite([place[row] for row in sorted(bad)], part.requests)
                for row in bad:
                    self.fail(part.requests[place[row]].outputs.group, error)
            self._take_in(part, output, flight.version, flight.number)

    def _take_in(self, part: DrawnPart, output: SampleOutput, version: str, number: int) -> None:
        token_ids, now = output.token_ids, time.time()
        scores = None if part.scores is None else part.scores.result()
        logprobs = [] if output.logprobs is None else output.logprobs.tolist()
        for i, (request, row) in enumerate(zip(part.requests, part.rows, strict=True)):
            state: SampleState = request.outputs
            if state.finished:
                continue
            request.token_ids[-1] = token_ids[row]
            state.note_token(request.num_output_tokens - 1, version, number)
            if request.return_logprob:
                state.logprobs.append(logprobs[row])
                if scores is not None:
                    wanted = request.token_ids_logprob
                    state.top.append(scores[i].top)
                    state.selected.append(list(zip(scores[i].given, wanted, strict=True)))
            if state.spec.return_token_times:
                state.token_times.append(now)
            reason = state.finish_reason(request)
            if reason is not None:
                self._finish(request, reason)
            elif state.group.stream:
                self._send(state.group, state.update(request, None, version, number))

    # ---- ends --------------------------------------------------------------------------------------------------------

    def _finish(self, request: Request, reason: FinishReason) -> None:
        request.outputs.routed = self._routes.read(request)
        self._scheduler.finish(request)
        self._end(request, reason)

    def abort(self, request: Request, message: str) -> None:
        """End `request` with what it has; its caller sees finish reason "abort". Nothing happens if it has ended."""
        if not request.outputs.finished:
            request.outputs.routed = self._routes.read(request)
            self._scheduler.abort(request)
            request.outputs.aborted = True
            self._end(request, FinishReason(type="abort", message=message))

    def _end(self, request: Request, reason: FinishReason) -> None:
        state: SampleState = request.outputs
        group = state.group
        state.finished = True
        group.num_finished += 1
        if self._hold is None:
            group.requests.pop(request, None)
        else:
            self._hold.ends(request)
        self._send(group, state.update(request, reason, self.version, self.number))
        if group.num_finished == group.num_samples:
            self._send(group, None)
            self.groups.pop(group.number, None)

    def open_some(self, group: GenerateGroup, limit: int) -> int:
        """Make at most `limit` of a call's samples requests; returns how many. With the last, `opening` goes."""
        opening = group.opening
        requests = opening.take(limit) if opening is not None else []
        if opening is None or not requests:
            group.opening = None
            return 0
        self._scheduler.add(requests)
        group.requests.update(dict.fromkeys(requests))
        if not opening.num_left:
            group.opening = None
        for request in requests:
            why = opening.why_ended(request)
            if why is not None:
                self.abort(request, why)
        return len(requests)

    def abort_group(
        self, group: GenerateGroup, message: str, rids: Collection[str] | None = None
    ) -> int:
        """End what goes by one of `rids` (None: all of a call) with what it has; returns how many samples."""
        chosen = [
            request
            for request in group.requests
            if not request.outputs.finished
            and (rids is None or request.rid in rids or request.outputs.spec.rid in rids)
        ]
        num = (
            len(chosen) if group.opening is None else len(chosen) + group.opening.end(message, rids)
        )
        for request in chosen:
            self.abort(request, message)
        return num

    def abort_all(self, message: str, *, held: bool = True) -> int:
        """End every request with what it has; returns how many there were. held: also calls that wait for a version."""
        groups = [group for group in self.groups.values() if held or not group.held]
        return sum(self.abort_group(group, message) for group in groups)

    def fail(self, group: GenerateGroup, error: Exception) -> None:
        """End a whole call with `error`: its results cannot be complete. Nothing happens if it has ended.

        While outputs are held the error is, too: if the version is undone, the call goes on as if it had never run.
        """
        if group.number not in self.groups:
            return
        self._send(group, error)
        if self._hold is None:
            return
        for request in group.requests:
            if not request.outputs.finished:
                self._scheduler.abort(request)
                self._hold.ends(request)
                request.outputs.finished = True
                group.num_finished += 1
        if group.opening is None:
            self.groups.pop(group.number)

    def fail_all(self, error: Exception) -> None:
        """End every call with `error`, also those whose answers are held: nobody will verify them any more."""
        hold, self._hold = self._hold, None
        held = {group.number: group for group, _ in (hold.news if hold is not None else ())}
        for group in (held | self.groups).values():
            self.discard(group)
            group.channel.fail(error)

    def discard(self, group: GenerateGroup) -> None:
        """Forget a call and all its requests without news."""
        self.groups.pop(group.number, None)
        group.opening = None
        for other in group.requests:
            if not other.outputs.finished:
                other.outputs.finished = other.outputs.aborted = True
                self._scheduler.abort(other)

    # ---- news --------------------------------------------------------------------------------------------------------

    def _send(self, group: GenerateGroup, update: News) -> None:
        """Hand out an update, or the end (None, or an error); in order, and not before the version is verified."""
        if self._hold is not None:
            self._hold.news.append((group, update))
        elif isinstance(update, Exception):
            self.discard(group)
            group.channel.fail(update)
        elif update is None:
            group.finish(group.num_samples)
        else:
            group.channel.stream(update)

    @property
    def holding(self) -> bool:
        """The version that computes at present is not verified, and may be undone."""
        return self._hold is not None

    def holds(self, rid: str) -> bool:
        """Whether a request of this id has ended, and may have to go on because the version is undone."""
        return self._hold is not None and self._hold.holds(rid)

    def hold(self) -> None:
        """Keep news back until `release`: the version that makes it is not verified yet."""
        self._hold = OutputHold(self.groups)

    def release(self, ok: bool) -> None:
        """Hand out what was held; with `ok` False undo it: those tokens were never sampled, their requests go on."""
        hold, self._hold = self._hold, None
        if hold is None:
            return
        news = hold.news
        if not ok:
            self._scheduler.retract_all()
            for request in hold.undo(self.groups):
                self.groups[request.outputs.group.number] = request.outputs.group
                self._scheduler.revive(request)
            news = hold.kept_news(self.version, self.number)
        for group, update in news:
            self._send(group, update)
        for group in self.groups.values():
            group.requests = {r: None for r in group.requests if not r.outputs.finished}
