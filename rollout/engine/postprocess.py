"""What follows the forward of a step: draw tokens, note log-probabilities, finish samples, send the news."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from weight_sync.errors import TornWeightsError

from ..layers.logprobs import selected_logprobs, token_logprobs, top_logprobs
from ..layers.sampler import Sampler
from ..runner.model_runner import ModelRunner
from ..scheduling.batch import SampleRow, ScheduledBatch
from ..scheduling.request import Request
from ..scheduling.scheduler import Scheduler
from .commands import FinishReason, SampleUpdate
from .sample_state import GenerateGroup, SampleState

LOGITS_BYTES = 64 << 20
"""Prompt log-probabilities are computed in pieces of at most this many bytes of logits."""


class Postprocessor:
    """Owns the output side of all requests under way; used on the engine loop's thread alone."""

    def __init__(self, scheduler: Scheduler, runner: ModelRunner, sampler: Sampler) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._sampler = sampler
        self._max_rows = max(1, LOGITS_BYTES // (4 * runner.model_config.vocab_size))
        self.groups: set[GenerateGroup] = set()
        self.version = ""
        """Label of the weights that compute the next step."""
        self.held = False
        """Keep news back until `release`: the version that made it is not verified yet."""
        self._held_news: list[tuple[GenerateGroup, SampleUpdate | None]] = []

    # ---- tokens ------------------------------------------------------------------------------------------------------

    def input_logprobs(self, batch: ScheduledBatch, hidden: torch.Tensor) -> None:
        """Log-probabilities of prompt tokens that this batch's logits give; position p gives token p + 1."""
        rows, owners = [], []
        offset = 0
        for item in batch.items:
            if item.input_logprobs is not None:
                rows += [offset + position - item.start for position in item.input_logprobs]
                owners += [(item.request, position) for position in item.input_logprobs]
            offset += item.length
        for first in range(0, len(rows), self._max_rows):
            piece = slice(first, first + self._max_rows)
            logits = self._runner.compute_logits(
                hidden[torch.tensor(rows[piece], device=hidden.device)]
            )
            self._note_inputs(logits, owners[piece])

    def _note_inputs(self, logits: torch.Tensor, owners: Sequence[tuple[Request, int]]) -> None:
        targets = [request.token_ids[position + 1] for request, position in owners]
        values = token_logprobs(logits, torch.tensor(targets, device=logits.device)).tolist()
        for row, ((request, position), value) in enumerate(zip(owners, values, strict=True)):
            inputs = request.outputs.inputs
            index = position + 1 - inputs.start
            inputs.values[index] = value
            if request.top_logprobs_num:
                inputs.top[index] = top_logprobs(logits[row], request.top_logprobs_num)
            if request.token_ids_logprob:
                inputs.selected[index] = selected_logprobs(logits[row], request.token_ids_logprob)

    def sample(
        self, batch: ScheduledBatch, hidden: torch.Tensor, rows: Sequence[SampleRow]
    ) -> None:
        """Draw a token for every request whose known tokens are all computed, and finish those that end."""
        last_rows, offset = [], 0
        for item in batch.items:
            offset += item.length
            last_rows.append(offset - 1)
        drawing = [row for row in rows if row.draws]
        for row in rows:
            if not row.draws:
                self._finish(row.request, FinishReason(type="length", length=0))
        for first in range(0, len(drawing), self._max_rows):
            piece = drawing[first : first + self._max_rows]
            picked = torch.tensor(
                [last_rows[row.item_index] for row in piece], device=hidden.device
            )
            self._draw(self._runner.compute_logits(hidden[picked]), [row.request for row in piece])

    def _draw(self, logits: torch.Tensor, requests: Sequence[Request]) -> None:
        drawn = self._sampler(logits, requests)
        now, version = time.time(), self.version
        append = self._scheduler.append_token
        for row, (request, token) in enumerate(zip(requests, drawn.token_ids, strict=True)):
            state: SampleState = request.outputs
            state.note_token(request.num_output_tokens, version)
            append(request, token)
            if request.return_logprob:
                state.logprobs.append(drawn.logprobs[row])
                if request.top_logprobs_num:
                    state.top.append(drawn.top_logprobs[row])
                if request.token_ids_logprob:
                    state.selected.append(drawn.selected_logprobs[row])
            if state.spec.return_token_times:
                state.token_times.append(now)
            reason = state.finish_reason(request)
            if reason is not None:
                self._finish(request, reason)
            elif state.group.stream:
                self._send(state.group, state.update(request, None, version))

    # ---- ends --------------------------------------------------------------------------------------------------------

    def _finish(self, request: Request, reason: FinishReason) -> None:
        self._scheduler.finish(request)
        self._end(request, reason)

    def abort(self, request: Request, message: str) -> None:
        """End `request` with what it has; its caller sees finish reason "abort". Nothing happens if it has ended."""
        if not request.outputs.finished:
            self._scheduler.abort(request)
            self._end(request, FinishReason(type="abort", message=message))

    def _end(self, request: Request, reason: FinishReason) -> None:
        state: SampleState = request.outputs
        group = state.group
        state.finished = True
        group.num_finished += 1
        self._send(group, state.update(request, reason, self.version))
        if group.num_finished == group.num_samples:
            self._send(group, None)
            self.groups.discard(group)

    def fail(self, request: Request, error: Exception) -> None:
        """End the whole call that `request` belongs to with `error`: its results cannot be trusted to be complete."""
        group = request.outputs.group
        if group in self.groups:
            self.discard(group)
            group.channel.fail(error)

    def discard(self, group: GenerateGroup) -> None:
        """Forget a call and all its requests without news."""
        self.groups.discard(group)
        for other in group.requests:
            if not other.outputs.finished:
                other.outputs.finished = True
                self._scheduler.abort(other)

    # ---- news --------------------------------------------------------------------------------------------------------

    def _send(self, group: GenerateGroup, update: SampleUpdate | None) -> None:
        """Hand out an update, or the final answer (None); in order, and not before the version is verified."""
        if self.held:
            self._held_news.append((group, update))
        elif update is None:
            group.finish(group.num_samples)
        else:
            group.channel.stream(update)

    def release(self, ok: bool) -> None:
        """Hand out what was held; with `ok` False the tokens are wrong: drop them and fail their calls."""
        self.held = False
        news, self._held_news = self._held_news, []
        for group, update in news:
            if ok:
                self._send(group, update)
            else:
                self._reject(group)

    def _reject(self, group: GenerateGroup) -> None:
        self.discard(group)
        group.channel.fail(
            TornWeightsError(
                "tokens of an update that failed its verification were dropped; push a complete update first"
            )
        )
