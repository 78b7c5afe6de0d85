"""The backend in torch operations: index tensors made on the host, gathers and fused attention of torch."""

from __future__ import annotations

import numpy as np
import torch

from ..layers.attention import PagedStep
from ..layers.torch_step import TorchStep
from ..layers.workspace import Workspace
from ..models.decoder import GivenRows
from ..scheduling.batch import ScheduledBatch
from ..scheduling.request import PENDING
from .attention_backend import BackendContext, DrawnTokens, PlannedStep, given_rows
from .forward_batch import AttentionPlanner, ForwardBatch, GroupLimits, Ints

_GATHER_BYTES = 8 << 20
"""Keys and values gathered at once; measured flat from 4 to 16 MB with a last-level cache of 32 MB."""
_PADDING_BYTES = 512 << 10
"""Keys and values gathered in vain per call; takes about as long as the call itself."""
_PADDED_QUERIES = 8192
"""Padded query tokens in one call."""


class TorchBackend:
    """`AttentionBackend` on any device."""

    name = "torch"
    on_device = False

    def __init__(self, context: BackendContext) -> None:
        self._context = context
        self._workspace = Workspace(context.dtype, context.device)
        layer_bytes = context.kv_pool.layers[0][0].nbytes
        self.limits = GroupLimits(
            max_blocks=max(1, _GATHER_BYTES // layer_bytes),
            max_padding_blocks=max(1, _PADDING_BYTES // layer_bytes),
            max_queries=_PADDED_QUERIES,
        )
        """When sequences share a kernel call; a matter of speed alone, and may be changed between steps."""

    def plan(self, batch: ScheduledBatch, drawn: DrawnTokens | None) -> PlannedStep:
        """Copy and clear blocks, upload the indices."""
        context = self._context
        context.kv_pool.copy_blocks(batch.block_copies)
        host = ForwardBatch.of(batch.items, context.block_size)
        context.kv_pool.clear_blocks(self._upload(host.partial_blocks))
        plans = {
            window: AttentionPlanner(host, window, context.block_size, self.limits).groups(
                context.dtype, context.device
            )
            for window in dict.fromkeys(context.config.sliding_windows)
        }
        angles = context.model.rotary.angles(self._upload(host.positions), context.dtype)
        slots = self._upload(host.slots)
        return PlannedStep(
            token_ids=self._token_ids(batch, host, drawn),
            step=TorchStep(
                paged=PagedStep(slots=slots, plans=plans, workspace=self._workspace),
                angles=angles,
                pools=context.kv_pool.layers,
                routes=context.kv_pool.routes,
            ),
            item_rows=self._upload(host.item_rows),
            given=self._given(batch, host),
        )

    def _given(self, batch: ScheduledBatch, host: ForwardBatch) -> GivenRows | None:
        found = given_rows(batch.items)
        if found is None:
            return None
        places, values = found
        values = values.to(self._context.device, self._context.dtype)
        return GivenRows(self._upload(host.item_rows[places]), values)

    def _token_ids(
        self, batch: ScheduledBatch, host: ForwardBatch, drawn: DrawnTokens | None
    ) -> torch.Tensor:
        token_ids = self._upload(host.token_ids)
        if drawn is None or not (host.token_ids == PENDING).any():
            return token_ids
        targets, sources, row = [], [], 0
        for item in batch.items:
            row += item.length
            if item.request.token_ids[item.end - 1] == PENDING:
                targets.append(host.item_rows[row - 1])
                sources.append(drawn.rows[item.request])
        rows = self._upload(np.array(targets))
        found = drawn.tokens.index_select(0, self._upload(np.array(sources)))
        return token_ids.index_copy_(0, rows, found.to(token_ids.dtype))

    def _upload(self, indices: Ints) -> torch.Tensor:
        return torch.from_numpy(indices).to(self._context.device)
