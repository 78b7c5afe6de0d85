"""From a scheduled batch to index tensors: which token goes where, and who attends to what.

All of it is made once per step and shared by the layers. Rows are put in the order that attention wants: single-token
items first, by length, then longer ones by length, so that each attention group is a run of rows. T tokens, N items.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch

from ..layers.attention import AttentionGroup
from ..scheduling.batch import ScheduledItem

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupLimits:
    """When sequences of different lengths share a kernel call."""

    max_blocks: int
    """Most blocks gathered at once, so that the gathered keys stay in the processor's cache; a longer one is alone."""
    max_padding_blocks: int
    """Most blocks gathered in vain in one call: about as much time as a call of its own costs."""
    max_queries: int
    """Most padded query tokens of a call that has several sequences."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardBatch:
    """One step's indices, on the host."""

    token_ids: Ints
    """(T), in row order, as all that follows."""
    positions: Ints
    """(T)."""
    slots: Ints
    """(T): block * block_size + offset."""
    item_rows: Ints
    """(T): the row of each token in item order, the order in which the caller reads results."""
    partial_blocks: Ints
    """Blocks that this step begins and does not fill; to be cleared first."""
    starts: Ints
    """(N): tokens of each item that are in the cache already."""
    lengths: Ints
    """(N): tokens of each item in this step."""
    rows: Ints
    """(N): first row of each item."""
    tables: Ints
    """Block tables of all items, one after another."""
    table_starts: Ints
    """(N): where each item's block table starts."""

    @classmethod
    def of(cls, items: Sequence[ScheduledItem], block_size: int) -> ForwardBatch:
        """Sort the items and lay out their tokens."""
        starts = np.array([item.start for item in items], dtype=np.int64)
        lengths = np.array([item.length for item in items], dtype=np.int64)
        order = np.lexsort((starts + lengths, lengths, starts > 0, lengths > 1))
        item_starts = _exclusive_sum(lengths)
        starts, lengths = starts[order], lengths[order]
        ordered = [items[i] for i in order.tolist()]
        num_blocks = -(-(starts + lengths) // block_size)
        tables = np.fromiter(
            chain.from_iterable(
                item.request.block_ids[:count]
                for item, count in zip(ordered, num_blocks.tolist(), strict=True)
            ),
            dtype=np.int64,
        )
        table_starts = _exclusive_sum(num_blocks)
        rows = _exclusive_sum(lengths)
        num_tokens = int(lengths.sum())
        within = np.arange(num_tokens) - np.repeat(rows, lengths)
        positions = np.repeat(starts, lengths) + within
        blocks = tables[np.repeat(table_starts, lengths) + positions // block_size]
        item_rows = np.empty(num_tokens, dtype=np.int64)
        item_rows[np.repeat(item_starts[order], lengths) + within] = np.arange(num_tokens)
        ends = starts + lengths
        begun = (ends % block_size != 0) & ((ends - 1) // block_size * block_size >= starts)
        return cls(
            token_ids=np.fromiter(_tokens(ordered), dtype=np.int64, count=num_tokens),
            positions=positions,
            slots=blocks * block_size + positions % block_size,
            item_rows=item_rows,
            partial_blocks=tables[(table_starts + num_blocks - 1)[begun]],
            starts=starts,
            lengths=lengths,
            rows=rows,
            tables=tables,
            table_starts=table_starts,
        )


def _tokens(items: Sequence[ScheduledItem]) -> Iterator[int]:
    for item in items:
        if item.length == 1:
            yield item.request.token_ids[item.start]
        else:
            yield from item.request.token_ids[item.start : item.start + item.length]


def _exclusive_sum(values: Ints) -> Ints:
    return np.cumsum(values) - values


class AttentionPlanner:
    """Groups the items of a step, for one sliding window or none."""

    def __init__(
        self, batch: ForwardBatch, window: int | None, block_size: int, limits: GroupLimits
    ) -> None:
        self.batch = batch
        self.window = window
        self.block_size = block_size
        self.limits = limits
        self.ends = batch.starts + batch.lengths
        self.first_blocks = np.zeros_like(self.ends)
        if window is not None:
            self.first_blocks = np.maximum(batch.starts - window + 1, 0) // block_size
        self.num_blocks = -(-self.ends // block_size) - self.first_blocks

    def groups(self, dtype: torch.dtype, device: torch.device) -> list[AttentionGroup]:
        """The groups in row order, with their index tensors and masks on `device`."""
        return [self._group(first, last, dtype, device) for first, last in self._runs()]

    def _runs(self) -> Iterator[tuple[int, int]]:
        """Runs of items, half open, as large as the limits and the kinds allow."""
        lengths, counts = self.batch.lengths.tolist(), self.num_blocks.tolist()
        fresh = (self.batch.starts == 0).tolist()
        limits = self.limits
        first, most, total = 0, 0, 0
        for i, count in enumerate(counts):
            size = i - first + 1
            longest = max(most, count)
            split = i > first and (
                (lengths[i] > 1) != (lengths[first] > 1)
                or (lengths[i] > 1 and fresh[i] != fresh[first])
                or size * longest > limits.max_blocks
                or size * longest - total - count > limits.max_padding_blocks
                or (lengths[i] > 1 and size * lengths[i] > limits.max_queries)
            )
            if split:
                yield first, i
                first, longest, total = i, count, 0
            most, total = longest, total + count
        yield first, len(counts)

    def _group(
        self, first: int, last: int, dtype: torch.dtype, device: torch.device
    ) -> AttentionGroup:
        items = slice(first, last)
        batch = self.batch
        lengths, starts, rows = batch.lengths[items], batch.starts[items], batch.rows[items]
        counts, ends = self.num_blocks[items], self.ends[items]
        query_len, most = int(lengths.max()), int(counts.max())
        columns = np.minimum(np.arange(most)[None], counts[:, None] - 1)
        table = batch.tables[
            (batch.table_starts[items] + self.first_blocks[items])[:, None] + columns
        ]
        causal = query_len > 1 and not starts.any() and self._window_is_idle(query_len)
        padded_rows = real_rows = None
        if query_len > 1 and (lengths != query_len).any():
            offsets = np.arange(query_len)[None]
            local = (rows - rows[0])[:, None]
            padded = (local + np.minimum(offsets, lengths[:, None] - 1)).ravel()
            padded_rows = torch.from_numpy(padded).to(device)
            real = np.flatnonzero((offsets < lengths[:, None]).ravel())
            real_rows = torch.from_numpy(real).to(device)
        kv_len = query_len if causal else most * self.block_size
        shift = self.first_blocks[items] * self.block_size
        mask = None
        if not causal:
            mask = self._mask(starts - shift, ends - shift, query_len, kv_len, dtype, device)
        return AttentionGroup(
            first_row=int(rows[0]),
            last_row=int(rows[-1] + lengths[-1]),
            batch=last - first,
            query_len=query_len,
            blocks=torch.from_numpy(table.ravel()).to(device),
            kv_len=kv_len,
            mask=mask,
            padded_rows=padded_rows,
            real_rows=real_rows,
        )

    def _window_is_idle(self, longest: int) -> bool:
        return self.window is None or longest <= self.window

    def _mask(
        self,
        starts: Ints,
        ends: Ints,
        query_len: int,
        kv_len: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> torch.Tensor:
        """0 where the query at start + i, at most end - 1, sees a key, else -inf; all relative to the first block."""
        keys = torch.arange(kv_len, device=device)
        last_seen = np.minimum(starts[:, None] + np.arange(query_len)[None], ends[:, None] - 1)
        seen = torch.from_numpy(last_seen).to(device)[:, None, :, None]
        hidden = keys > seen
        if self.window is not None:
            hidden |= keys <= seen - self.window
        mask = torch.zeros(hidden.shape, dtype=dtype, device=device)
        return mask.masked_fill_(hidden, float("-inf"))
