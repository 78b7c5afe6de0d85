"""The backend in fused kernels: everything that a step needs goes to the device in one small copy."""

from __future__ import annotations

from itertools import chain
from typing import Any

import numpy as np
import torch

from rollout_kernels.paged_decode import DecodeWorkspace
from rollout_kernels.qk_norm_rope import rotary_table
from rollout_kernels.shared_prefix_decode import SharedState

from ..layers.triton_step import DeviceBatch, TritonStep
from ..models.decoder import GivenRows
from ..scheduling.batch import ScheduledBatch
from ..scheduling.request import PENDING
from .attention_backend import BackendContext, DrawnTokens, PlannedStep, given_rows
from .staging import Array, Staging

_TABLE_UNIT = 16


class TritonBackend:
    """`AttentionBackend` on CUDA, and in triton's interpreter."""

    name = "triton"
    on_device = True
    shares_prefixes = True
    """Its decode reads a prefix that requests share once for all of them."""

    def __init__(self, context: BackendContext) -> None:
        self.context = context
        config = context.config
        self.staging = Staging(context.device)
        self.rotary_table = rotary_table(
            context.model.rotary.frequencies, config.max_position_embeddings, context.dtype
        )
        layer = context.model.attention_layer
        self._workspace = DecodeWorkspace.allocate(
            max_batch=context.max_batch,
            num_heads=layer.num_heads,
            num_kv_heads=layer.num_kv_heads,
            head_dim=layer.head_dim,
            device=context.device,
        )
        self._shared_state = SharedState.allocate(
            max_batch=context.max_batch,
            num_heads=layer.num_heads,
            num_kv_heads=layer.num_kv_heads,
            head_dim=layer.head_dim,
            device=context.device,
        )

    def plan(self, batch: ScheduledBatch, drawn: DrawnTokens | None) -> PlannedStep:
        """Lay out the batch in item order; nothing waits for the device."""
        context, items = self.context, batch.items
        size = context.block_size
        starts = np.array([item.start for item in items], dtype=np.int32)
        lengths = np.array([item.length for item in items], dtype=np.int32)
        ends = starts + lengths
        num_decodes = int(np.argmax(lengths > 1)) if (lengths > 1).any() else len(items)
        num_blocks = -(-ends // size)
        # Kernels are specialised for strides that 16 divides: all tables have such a one.
        width = -(-int(num_blocks.max()) // _TABLE_UNIT) * _TABLE_UNIT
        tables = np.zeros((len(items), width), dtype=np.int32)
        for row, (item, count) in enumerate(zip(items, num_blocks.tolist(), strict=True)):
            tables[row, :count] = item.request.block_ids[:count]
        first_rows = np.cumsum(lengths, dtype=np.int32) - lengths
        within = np.arange(int(lengths.sum()), dtype=np.int32) - np.repeat(first_rows, lengths)
        positions = np.repeat(starts, lengths) + within
        sequences = np.repeat(np.arange(len(items)), lengths)
        slots = tables[sequences, positions // size] * size + positions % size
        token_ids = np.fromiter(
            chain.from_iterable(item.request.token_ids[item.start : item.end] for item in items),
            dtype=np.int32,
            count=len(positions),
        )
        query_starts = np.append(first_rows[num_decodes:], len(positions)) - num_decodes
        pairs = np.array(batch.block_copies, dtype=np.int64).reshape(-1, 2)
        arrays: list[Array] = [token_ids, positions, slots, tables, ends, pairs[:, 0], pairs[:, 1]]
        arrays.append(query_starts.astype(np.int32))
        pending = np.flatnonzero(token_ids == PENDING)
        if len(pending):
            assert drawn is not None
            who = [items[row].request for row in sequences[pending].tolist()]
            arrays += [pending, np.array([drawn.rows[request] for request in who])]
        on_device = self.staging.upload(arrays)
        if len(pairs):
            context.kv_pool.copy_on_device(on_device[5], on_device[6])
        if len(pending):
            assert drawn is not None
            found = drawn.tokens.index_select(0, on_device[9])
            on_device[0].index_copy_(0, on_device[8], found.to(torch.int32))
        return PlannedStep(
            token_ids=on_device[0],
            step=self.step(
                DeviceBatch(
                    positions=on_device[1],
                    slots=on_device[2],
                    block_tables=on_device[3],
                    seq_lens=on_device[4],
                    num_decodes=num_decodes,
                    query_starts=on_device[7] if num_decodes < len(items) else None,
                    max_query_len=int(lengths.max()),
                    max_len=int(ends[:num_decodes].max(initial=1)),
                    max_later_len=int(ends[num_decodes:].max(initial=1)),
                )
            ),
            item_rows=None,
            given=self._given(batch),
        )

    def _given(self, batch: ScheduledBatch) -> GivenRows | None:
        """Rows are large and rare: the host waits for their copy, so that none of them stays pinned."""
        found = given_rows(batch.items)
        if found is None:
            return None
        context = self.context
        rows = torch.from_numpy(found[0]).to(context.device)
        return GivenRows(rows, found[1].to(context.device, context.dtype))

    def compute_padding(self, num_decodes: int, num_tokens: int, max_len: int) -> torch.Tensor:
        """A step of nobody's decodes, of at most `max_len` tokens each, and of a prompt of nobody's `num_tokens` (0:
        none), of which nothing is kept; hidden states."""
        context = self.context

        def numbers(*shape: int, value: int = 0) -> torch.Tensor:
            return torch.full(shape, value, dtype=torch.int32, device=context.device)

        num_rows, num_prompts = num_decodes + num_tokens, min(num_tokens, 1)
        width = -(-max(num_tokens, 1) // (context.block_size * _TABLE_UNIT)) * _TABLE_UNIT
        seq_lens = numbers(num_decodes + num_prompts)
        seq_lens[num_decodes:] = num_tokens
        query_starts = numbers(2)
        query_starts[1:] = num_tokens
        batch = DeviceBatch(
            positions=numbers(num_rows),
            slots=numbers(num_rows, value=-1),
            block_tables=numbers(num_decodes + num_prompts, width),
            seq_lens=seq_lens,
            num_decodes=num_decodes,
            query_starts=query_starts if num_tokens else None,
            max_query_len=max(num_tokens, 1),
            max_len=max_len,
            max_later_len=max(num_tokens, 1),
        )
        states: torch.Tensor = context.model(numbers(num_rows), self.step(batch))
        return states

    def step(self, batch: DeviceBatch) -> TritonStep:
        """The step over a batch that is on the device."""
        return TritonStep(batch, **self._parts())

    def _parts(self) -> dict[str, Any]:
        """What all steps have in common."""
        return {
            "pools": self.context.kv_pool.layers,
            "routes": self.context.kv_pool.routes,
            "rotary_table": self.rotary_table,
            "workspace": self._workspace,
            "shared_state": self._shared_state,
            "deterministic": self.context.deterministic,
        }
