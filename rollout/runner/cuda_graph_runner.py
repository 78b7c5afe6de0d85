"""A decode step as one CUDA graph: from the last tokens, which are on the device, to the next ones.

Per step the host writes one small buffer: where each row's token and KV block are, and how it samples. Everything that
a graph reads or writes keeps its address: that buffer, the block tables, the logits, the sampler's results, the
parameters and the KV pool. Addresses of the last two are looked at before every replay, because giving memory back
moves them; then the graphs are captured again.

With several ranks the graphs hold their collectives too. All ranks capture the same graphs in the same order, at the
same step, and lose them together: what a rank would do alone, the others would wait for.

On a CPU the same steps run without a graph (in triton's interpreter), so that they can be tested.

B rows of a graph, of which the last may be padding; W blocks of a table.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rollout_kernels.compiling import compile_ahead
from rollout_kernels.shared_prefixes import SharedPrefixes, num_numbers

from ..layers.device_sampler import DeviceSampler
from ..layers.sampler import PendingSample
from ..layers.triton_step import DeviceBatch
from ..scheduling.batch import ScheduledBatch
from ..scheduling.request import PENDING, Request
from .attention_backend import DrawnTokens
from .block_tables import HostBlockTables
from .capture_progress import Progress
from .shared_prefixes import PrefixFinder
from .staging import Array, aligned
from .triton_backend import TritonBackend

_NUM_INPUTS = 6
_DECODES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Decodes beside a prompt, or in steps without a graph,"""
_LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096)
"""and how long they may be: between them, all numbers of splits of their keys."""
_PROMPT = 256
"""Tokens of a prompt that is computed only so that kernels are compiled."""
_INPUT_BYTES = 128
"""More than the bytes of a row's numbers."""


def batch_sizes_to_capture(max_batch: int) -> list[int]:
    """1, 2, 4, then steps of an eighth of the size, up to `max_batch`: padding costs little, and so do graphs."""
    sizes = {1, 2, 4, max_batch}
    size = 8
    while size < max_batch:
        sizes.add(size)
        size += max(8, 1 << (size.bit_length() - 3))
    return sorted(size for size in sizes if size <= max_batch)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kind:
    """What one graph does."""

    size: int
    """B."""
    filters: bool = False
    """Some row is sampled with top-k, top-p or min-p."""
    shared: bool = False
    """Prefixes that rows share are read once."""


class CudaGraphRunner:
    """Runs decode steps of up to `max_batch` rows. Not thread-safe; one stream."""

    def __init__(
        self,
        backend: TritonBackend,
        sampler: DeviceSampler,
        *,
        max_batch: int,
        context_length: int,
    ) -> None:
        context = backend.context
        self._backend = backend
        self._sampler = sampler
        self._model = context.model
        self._device = context.device
        self._max_len = context_length
        blocks = -(-context_length // context.block_size)
        self._width = -(-blocks // 16) * 16  # a stride for which kernels are specialised
        self._batch_sizes = batch_sizes_to_capture(max_batch)
        self.max_batch = max_batch
        self._tables = torch.zeros((max_batch, self._width), dtype=torch.int32, device=self._device)
        self._inputs = torch.zeros(
            max_batch * _INPUT_BYTES + 4096 + aligned(4 * self._tables.numel()),
            dtype=torch.uint8,
            device=self._device,
        )
        self.logits = torch.zeros(
            (max_batch, context.config.vocab_size), dtype=context.dtype, device=self._device
        )
        """(max_batch, V): of the last replay, until the next."""
        self._host_tables = HostBlockTables(max_batch, self._width)
        self._prefixes = PrefixFinder(context, backend.shares_prefixes)
        self._graphs: dict[_Kind, Callable[[], None]] = {}
        self._addresses: tuple[int, ...] = ()
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None
        self.num_captures = 0
        """How often `capture` was called."""

    # ---- before a step -----------------------------------------------------------------------------------------------

    def can_run(self, batch: ScheduledBatch) -> bool:
        """Every item continues an output, and there are not too many."""
        return (
            batch.forward_mode.is_decode()
            and batch.num_tokens <= self.max_batch
            and not batch.block_copies
            and all(item.start >= item.request.num_prompt_tokens for item in batch.items)
        )

    def capture(self, progress: Progress | None = None) -> None:
        """Capture a graph for every batch size, largest first, so that the smaller ones fit into its memory.

        All ranks call it at the same place in their order.
        """
        self.forget()
        self._addresses = self._current_addresses()
        self.num_captures += 1
        if self._device.type == "cuda":
            self._pool = torch.cuda.graph_pool_handle()
            kinds = [_Kind(size=size) for size in self._batch_sizes]
            if self._prefixes.possible:
                kinds += [_Kind(size=size, shared=True) for size in self._batch_sizes if size > 1]
            kinds.sort(key=lambda kind: -kind.size)
            stream = self._side_stream()
            with frozen_gc():
                if self.num_captures == 1:  # Later ones find the kernels there.
                    self._compile(kinds, stream)
                for done, kind in enumerate(kinds):
                    if progress is not None:
                        progress(f"decode step of {kind.size}", done, len(kinds))
                    self._graphs[kind] = self._captured(kind, stream)
            torch.cuda.current_stream(self._device).wait_stream(stream)

    @property
    def captured(self) -> bool:
        """There are graphs, wherever parameters and KV pool are by now."""
        return bool(self._addresses)

    @property
    def moved(self) -> bool:
        """Parameters or KV pool are not where the graphs have them; where one rank says so, all are to `forget`."""
        return self._addresses != self._current_addresses()

    def forget(self) -> None:
        """Let go of all graphs; the next step captures them anew. A communicator ends only after its graphs."""
        self._graphs.clear()
        self._addresses = ()

    def _compile(self, kinds: Sequence[_Kind], stream: torch.cuda.Stream) -> None:
        """Compile what these kinds, and steps with a prompt, launch. Ranks compile alone, and do not talk meanwhile."""
        stream.wait_stream(torch.cuda.current_stream(self._device))
        model = self._model
        with model.tp.muted(), model.few_layers(), torch.cuda.stream(stream), compile_ahead():
            self._run_padding(kinds)
        torch.cuda.current_stream(self._device).wait_stream(stream)

    def _run_padding(self, kinds: Sequence[_Kind]) -> None:
        with torch.inference_mode():
            for kind in kinds:
                self._body(kind, self._backend.staging.upload(_padding(kind.size)))
            self._backend.compute_padding(0, _PROMPT, 1)
            for num_decodes in (num for num in _DECODES if num <= self.max_batch):
                for max_len in (self._max_len, *_LENGTHS):
                    self._backend.compute_padding(num_decodes, 0, max_len)
                self._backend.compute_padding(num_decodes, _PROMPT, self._max_len)
            # Draws behind a prompt, whose samples share a row of logits, and those with filters.
            rows, *inputs = self._backend.staging.upload(_padding(1))
            columns = inputs[_NUM_INPUTS - 1 : -1]
            for filters in (False, True):
                for shared in (None, rows):
                    self._sampler.run(self.logits[:1], columns, filters=filters, logit_rows=shared)

    def _captured(self, kind: _Kind, stream: torch.cuda.Stream) -> Callable[[], None]:
        """Run the step once, so that libraries are ready, then capture it."""
        inputs = self._backend.staging.upload(_padding(kind.size), into=self._inputs)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream), torch.inference_mode():
            self._body(kind, inputs)
        graph = torch.cuda.CUDAGraph()
        with (
            torch.inference_mode(),
            paused_gc(),
            torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="relaxed"),
        ):
            self._body(kind, inputs)
        replay: Callable[[], None] = graph.replay
        return replay

    def _side_stream(self) -> torch.cuda.Stream:
        """Always the same: torch's allocator keeps for each stream what was once taken there."""
        self._stream = self._stream or torch.cuda.Stream(self._device)
        return self._stream

    def _current_addresses(self) -> tuple[int, ...]:
        buffers = self._model.arena.buffers.values()
        pool = self._backend.context.kv_pool.memory
        return (*(buffer.data_ptr() for buffer in buffers), pool.data_ptr())

    # ---- a step ------------------------------------------------------------------------------------------------------

    def replay(self, batch: ScheduledBatch, drawn: DrawnTokens | None) -> PendingSample | None:
        """Compute the step: row i of `logits` is that of item i, and a token is drawn from each.

        None: some row asks for more than a graph can do, and tokens are to be drawn from `logits`.
        """
        requests = [item.request for item in batch.items]
        size = next(size for size in self._batch_sizes if size >= len(requests))
        known = self._sampler.known(requests)
        with torch.inference_mode():
            inputs, shared = self._upload(batch, requests, size, drawn)
            self._run(_Kind(size=size, filters=known.filtered, shared=shared), inputs)
            whole = not known.editable and not known.wants_tables
            return self._sampler.fetch(requests) if whole else None

    def _run(self, kind: _Kind, inputs: Sequence[torch.Tensor]) -> None:
        if self.moved:
            # Other ranks would not notice, and wait for this one's collectives.
            assert not self._addresses or self._model.tp.size == 1, (
                "`forget` comes first, on all ranks"
            )
            with self._kept_inputs():
                self.capture()
        if self._device.type != "cuda":
            self._body(kind, inputs)
            return
        if kind not in self._graphs:
            with self._kept_inputs():
                stream = self._side_stream()
                self._graphs[kind] = self._captured(kind, stream)
                torch.cuda.current_stream(self._device).wait_stream(stream)
        self._graphs[kind]()

    @contextmanager
    def _kept_inputs(self) -> Iterator[None]:
        """What the step at hand reads is as before, though a capture used it."""
        kept = self._inputs.clone(), self._sampler.tokens.clone()
        yield
        self._inputs.copy_(kept[0])
        self._sampler.tokens.copy_(kept[1])

    def _upload(
        self,
        batch: ScheduledBatch,
        requests: list[Request],
        size: int,
        drawn: DrawnTokens | None,
    ) -> tuple[list[torch.Tensor], bool]:
        """One copy for all numbers of the step, and one on the device for the block tables.

        Also says whether prefixes are shared.
        """
        num, block_size = len(requests), self._backend.context.block_size
        positions = np.fromiter((item.start for item in batch.items), np.int32, num)
        rows = self._host_tables.rows(requests)
        width = int(positions.max()) // block_size + 1
        tables = self._host_tables.gather(rows, width)
        columns = np.zeros((_NUM_INPUTS, size), np.int32)
        columns[3] = -1
        columns[0, :num] = tokens = np.fromiter(
            (request.token_ids[-1] for request in requests), np.int32, num
        )
        if drawn is not None:
            known = drawn.rows
            for row in np.flatnonzero(tokens == PENDING).tolist():
                columns[1, row] = known[requests[row]]
        columns[2, :num] = positions
        blocks = tables[np.arange(num), positions // block_size]
        columns[3, :num] = blocks * block_size + positions % block_size
        columns[4, :num] = positions + 1
        resets = self._host_tables.num_resets
        shared = self._prefixes.find(requests, positions, size, resets)
        columns[5] = np.argsort(shared.done - columns[4])
        arrays = [*columns, *self._sampler.columns(requests, size), shared.numbers, tables]
        *inputs, uploaded = self._backend.staging.upload(arrays, into=self._inputs)
        self._tables[:num, :width].copy_(uploaded)
        return inputs, shared.pays

    def _body(self, kind: _Kind, inputs: Sequence[torch.Tensor]) -> None:
        """What a graph holds. It counts no experts: padding goes to none, and the counts may be gone when it is
        replayed."""
        size = kind.size
        token_ids, sources, positions, slots, seq_lens, order, *columns, prefixes = inputs
        drawn = self._sampler.tokens.index_select(0, sources)
        token_ids = torch.where(token_ids >= 0, token_ids, drawn)
        step = self._backend.step(
            DeviceBatch(
                positions=positions,
                slots=slots,
                block_tables=self._tables[:size],
                seq_lens=seq_lens,
                num_decodes=size,
                query_starts=None,
                max_query_len=1,
                max_len=self._max_len,
                shared=SharedPrefixes.views(prefixes, size) if kind.shared else None,
                order=order,
                captured=True,
            )
        )
        logits = self.logits[:size]
        with self._model.uncounted():
            states = self._model(token_ids, step)
        self._model.logits(states, out=logits)
        self._sampler.run(logits, columns, filters=kind.filters)


def _padding(size: int) -> list[Array]:
    """Inputs of a step whose rows are all padding."""
    numbers = np.zeros(size, np.int32)
    return [
        *(numbers, numbers, numbers, numbers - 1, numbers, np.arange(size, dtype=np.int32)),
        *(np.zeros(size, np.int64), numbers, np.ones(size, np.float32)),
        *(np.ones(size, np.uint8), numbers, np.ones(size, np.float32)),
        *(np.zeros(size, np.float32), np.zeros(num_numbers(size), np.int32)),
    ]


@contextmanager
def frozen_gc() -> Iterator[None]:
    """No garbage collection, and those that torch asks for look at nothing that lives now. What was frozen before stays
    so."""
    was_frozen = gc.get_freeze_count() > 0
    gc.collect()
    gc.freeze()
    try:
        with paused_gc():
            yield
    finally:
        if not was_frozen:
            gc.unfreeze()


@contextmanager
def paused_gc() -> Iterator[None]:
    """No garbage collection: it may free a CUDA tensor in the middle of a capture."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
