"""Which experts the tokens of a request went to: read from beside its keys, before its blocks are given back."""

from __future__ import annotations

import torch

from ...protocol.commands import RoutedExperts
from ...runner.kv_pool import KVPool
from ...scheduling.request import PENDING, Request
from ...scheduling.scheduler import Scheduler
from .sample_state import SampleState


class RouteReader:
    """On the engine loop's thread alone."""

    def __init__(self, scheduler: Scheduler, pool: KVPool) -> None:
        self._kv = scheduler.kv
        self._pool = pool
        if pool.routes is not None:
            scheduler.before_suspend = self._keep

    def read(self, request: Request) -> RoutedExperts | None:
        """Of the tokens that a request has computed, but for its last one; waits for the device. None: not asked for.

        To be called while the request has its blocks.
        """
        state: SampleState = request.outputs
        if not state.spec.return_routed_experts:
            return None
        kept, state.kept_routes = state.kept_routes, None
        found = (self._rows(request) if request.num_computed or kept is None else kept).cpu()
        num_tokens, num_layers, top_k = found.shape
        data = found.contiguous().numpy().astype("<i2").tobytes()
        return RoutedExperts(shape=(num_tokens, num_layers, top_k), data=data)

    def _keep(self, request: Request) -> None:
        """The token that is being drawn may turn out to be its last one, and then nothing is computed again."""
        if request.outputs.spec.return_routed_experts and request.token_ids[-1] == PENDING:
            request.outputs.kept_routes = self._rows(request)

    def _rows(self, request: Request) -> torch.Tensor:
        size = self._kv.block_size
        start = request.outputs.spec.routed_experts_start_len
        end = min(request.num_computed, request.num_tokens - 1)
        if start >= end:
            return self._pool.read_routes(torch.empty(0, dtype=torch.int64))
        positions = torch.arange(start, end)
        blocks = torch.tensor([self._kv.source_of(block) for block in request.block_ids])
        return self._pool.read_routes(blocks[positions // size] * size + positions % size)
