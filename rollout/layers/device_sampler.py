"""Drawing on the device: kernels that read each row's parameters there, results that come back one step late.

The rule is that of `sampler`. Nothing here waits for the device, but `result` of what was launched.

R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rollout_kernels.logit_edits import LogitEdits, count_table
from rollout_kernels.logit_filters import SamplingFilters
from rollout_kernels.sampling import SampledTokens, SamplingRows, SamplingScratch, sample

from ..scheduling.request import Request
from ..types import RequestStatus
from .device_scores import DeviceScores
from .logit_edits import is_editable
from .sampler import PendingSample, SampleOutput
from .scores import Asked, PendingScores

Array = npt.NDArray[Any]
Upload = Callable[[Sequence[Array]], list[torch.Tensor]]
_NUM_COLUMNS = 7
_FIRST_TABLES = 8


class _Known:
    """What does not change from step to step, for the rows of one batch."""

    def __init__(self, requests: list[Request]) -> None:
        params = [request.params for request in requests]
        self.requests = requests
        self.prompts = np.array([request.num_prompt_tokens for request in requests], np.int32)
        self.seeds = np.array([request.seed for request in requests], np.uint64).view(np.int64)
        self.temperature = np.array([p.logprob_temperature for p in params], np.float32)
        self.greedy = np.array([p.is_greedy for p in params], np.uint8)
        self.top_k = np.array([max(p.top_k, 0) for p in params], np.int64).clip(0, 2**31 - 1)
        self.top_k = self.top_k.astype(np.int32)
        self.top_p = np.array([p.top_p for p in params], np.float32)
        self.min_p = np.array([p.min_p for p in params], np.float32)
        kept = (self.top_k > 0) | (self.top_p < 1) | (self.min_p > 0)
        self.filtered = bool((kept & (self.greedy == 0)).any())
        self.editable = any(is_editable(p) for p in params)
        self.wants_tables = any(r.top_logprobs_num or r.token_ids_logprob for r in requests)
        self.wants_logprob = any(request.return_logprob for request in requests)


class _Fetched:
    """Results on their way to the host."""

    def __init__(
        self,
        sampler: DeviceSampler,
        buffer: torch.Tensor,
        event: Any,
        num_rows: int,
        logprobs: bool,
    ) -> None:
        self._sampler = sampler
        self._buffer = buffer
        self._event = event
        self._num_rows = num_rows
        self._logprobs = logprobs

    def result(self) -> SampleOutput:
        """Wait for the copy."""
        if self._event is not None:
            self._event.synchronize()
        capacity, rows = self._sampler.max_rows, slice(0, self._num_rows)
        host = self._buffer.numpy()
        tokens = host[: 8 * capacity].view(np.int64)[rows].tolist()
        logprobs = None
        if self._logprobs:
            copied = host[8 * capacity : 12 * capacity].view(np.float32)[rows].copy()
            logprobs = torch.from_numpy(copied)
        bad = np.flatnonzero(host[12 * capacity : 13 * capacity][rows]).tolist()
        self._sampler.give_back(self._buffer)
        return SampleOutput(token_ids=tokens, logprobs=logprobs, bad=tuple(bad))


@dataclass(slots=True)
class _CountTable:
    """A request's place in the pool of count tables."""

    index: int
    num_counted: int


class DeviceSampler:
    """Draws for up to `max_rows` rows; one thread, one stream. Buffers keep their addresses."""

    def __init__(
        self, *, max_rows: int, vocab_size: int, device: torch.device, upload: Upload
    ) -> None:
        self.max_rows = max_rows
        self.vocab_size = vocab_size
        self.device = device
        self._upload = upload
        self._memory = torch.zeros(13 * max_rows, dtype=torch.uint8, device=device)
        self._out = SampledTokens(
            token_ids=self._memory[: 8 * max_rows].view(torch.int64),
            logprobs=self._memory[8 * max_rows : 12 * max_rows].view(torch.float32),
            bad=self._memory[12 * max_rows :].view(torch.bool),
        )
        self.tokens = self._out.token_ids
        """(max_rows) int64: what was drawn last, in the order of its rows."""
        self._scratch = SamplingScratch.allocate(max_rows, vocab_size, device)
        self._spare: list[torch.Tensor] = []
        self._known: dict[Request, _Known] = {}
        self._counts: torch.Tensor | None = None
        self._owners: list[Request | None] = []

    # ---- what a graph needs ------------------------------------------------------------------------------------------

    def known(self, requests: list[Request]) -> _Known:
        """What these requests ask for; mostly the same as in the last step."""
        found = self._known.get(requests[0])
        if found is None or found.requests != requests:
            if len(self._known) >= 16:
                self._known.clear()
            found = self._known[requests[0]] = _Known(list(requests))
        return found

    def columns(self, requests: list[Request], num_rows: int) -> list[Array]:
        """The parameters of `requests` in `num_rows` rows, the rest padding; to be uploaded for `run`."""
        known = self.known(requests)
        lengths = np.fromiter((len(r.token_ids) for r in requests), np.int32, len(requests))
        columns = [
            known.seeds,
            lengths - known.prompts,
            known.temperature,
            known.greedy,
            known.top_k,
            known.top_p,
            known.min_p,
        ]
        missing = num_rows - len(requests)
        if missing:
            columns = [
                np.concatenate([column, np.full(missing, fill, column.dtype)])
                for column, fill in zip(columns, (0, 0, 1, 1, 0, 1, 0), strict=True)
            ]
        return columns

    def run(
        self,
        logits: torch.Tensor,
        columns: Sequence[torch.Tensor],
        *,
        filters: bool,
        logit_rows: torch.Tensor | None = None,
        edits: LogitEdits | None = None,
    ) -> None:
        """Launch the kernels over uploaded `columns`; what is drawn stays in `tokens`."""
        seeds, positions, temperature, greedy, top_k, top_p, min_p = columns
        sample(
            logits,
            SamplingRows(
                seeds=seeds,
                positions=positions,
                temperature=temperature,
                greedy=greedy.view(torch.bool),
                logit_rows=logit_rows,
            ),
            self._scratch,
            self._out,
            edits=edits,
            filters=SamplingFilters(top_k=top_k, top_p=top_p, min_p=min_p) if filters else None,
        )

    def fetch(self, requests: list[Request]) -> PendingSample:
        """Send what was drawn to the host; `requests` are its rows."""
        buffer = self._spare.pop() if self._spare else self._pinned()
        buffer.copy_(self._memory, non_blocking=True)
        event = None
        if self.device.type == "cuda":
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self.device))
        return _Fetched(self, buffer, event, len(requests), self.known(requests).wants_logprob)

    def give_back(self, buffer: torch.Tensor) -> None:
        """The results in `buffer` are read."""
        self._spare.append(buffer)

    def _pinned(self) -> torch.Tensor:
        size = self._memory.numel()
        with torch.inference_mode(False):  # a buffer is written in any mode later
            return torch.empty(size, dtype=torch.uint8, pin_memory=self.device.type == "cuda")

    # ---- outside of graphs -------------------------------------------------------------------------------------------

    def launch(
        self, logits: torch.Tensor, requests: Sequence[Request], rows: Sequence[int] | None = None
    ) -> PendingSample:
        """Draw for `requests` from logits in any dtype; row i is that of `requests[i]`, or `rows[i]` is."""
        requests = list(requests)
        known = self.known(requests)
        arrays = self.columns(requests, len(requests))
        arrays.append(np.arange(len(requests), dtype=np.int32) if rows is None else _int32(rows))
        edits = self._edit_arrays(requests) if known.editable else []
        uploaded = self._upload([*arrays, *edits])
        self.run(
            logits,
            uploaded[:_NUM_COLUMNS],
            filters=known.filtered,
            logit_rows=None if rows is None else uploaded[_NUM_COLUMNS],
            edits=self._edits(uploaded[_NUM_COLUMNS + 1 :]) if edits else None,
        )
        return self.fetch(requests)

    def score(
        self, logits: torch.Tensor, asked: Sequence[Asked], rows: Sequence[int] | None = None
    ) -> PendingScores:
        """Launch the kernels that score logits in any dtype: asked[i] of row i, or of row rows[i]."""
        return DeviceScores(logits, asked, rows, self._upload)

    def _edit_arrays(self, requests: list[Request]) -> list[Array]:
        """Columns of `LogitEdits` but for the counts, which are brought up to date."""
        params = [request.params for request in requests]
        tables = _int32([self._table(r) if r.params.has_penalties else -1 for r in requests])
        biases = [p.logit_bias or {} for p in params]
        ends = [r.stop_ids if r.params.min_new_tokens else () for r in requests]
        num_biases = _int32([len(bias) for bias in biases])
        num_ends = _int32([len(end) for end in ends])
        bias_ids = np.zeros((len(requests), _width(num_biases)), np.int32)
        values = np.zeros(bias_ids.shape, np.float32)
        end_ids = np.zeros((len(requests), _width(num_ends)), np.int32)
        for row, (bias, end) in enumerate(zip(biases, ends, strict=True)):
            bias_ids[row, : len(bias)] = list(bias)
            values[row, : len(bias)] = list(bias.values())
            end_ids[row, : len(end)] = end
        return [
            tables,
            np.array([p.repetition_penalty for p in params], np.float32),
            np.array([p.frequency_penalty for p in params], np.float32),
            np.array([p.presence_penalty for p in params], np.float32),
            bias_ids,
            values,
            num_biases,
            end_ids,
            num_ends,
            _int32([p.min_new_tokens for p in params]),
        ]

    def _edits(self, uploaded: Sequence[torch.Tensor]) -> LogitEdits:
        if self._counts is None:
            self._grow()
        assert self._counts is not None
        names = (
            *("tables", "repetition", "frequency", "presence", "bias_ids", "biases"),
            *("num_biases", "end_ids", "num_ends", "min_tokens"),
        )
        return LogitEdits(counts=self._counts, **dict(zip(names, uploaded, strict=True)))

    def _table(self, request: Request) -> int:
        """The request's table, which counts its whole output; the draw that follows is counted by the kernel."""
        place = request.sampler_state
        if not isinstance(place, _CountTable) or self._owners[place.index] is not request:
            place = request.sampler_state = _CountTable(self._free_table(request), -1)
        num_output = request.num_output_tokens
        if place.num_counted != num_output:
            start = request.num_prompt_tokens
            known = np.array(request.known_prompt, np.int64)
            drawn = np.array(request.token_ids[start:], np.int64)
            prompt, output = self._upload([known, drawn])
            assert self._counts is not None
            repeats = request.params.repetition_penalty != 1.0
            count_table(self._counts[place.index], prompt if repeats else None, output)
        place.num_counted = num_output + 1
        return place.index

    def _free_table(self, request: Request) -> int:
        for index, owner in enumerate(self._owners):
            if owner is None or owner.status is RequestStatus.FINISHED:
                self._owners[index] = request
                return index
        self._grow()
        return self._free_table(request)

    def _grow(self) -> None:
        """Twice the tables, with their contents."""
        num = len(self._owners)
        counts = torch.zeros(
            (2 * num or _FIRST_TABLES, self.vocab_size), dtype=torch.int16, device=self.device
        )
        if self._counts is not None:
            counts[:num].copy_(self._counts)
        self._counts = counts
        self._owners += [None] * (len(counts) - num)


def _int32(values: Sequence[int]) -> Array:
    return np.array(values, np.int32)


def _width(counts: Array) -> int:
    """A power of two, so that kernels are compiled for few widths."""
    return 1 << max(int(counts.max()) - 1, 0).bit_length()
