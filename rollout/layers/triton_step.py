"""A step in fused kernels over the paged pool: nothing in it waits for the host, and a CUDA graph can hold it.

N sequences, T tokens, E hidden size, H query heads, K KV heads, D head size, I feed-forward width, S block size,
P positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rollout_kernels.expert_configs import EXACT
from rollout_kernels.expert_routing import choose_experts
from rollout_kernels.fused_norm import add_rms_norm
from rollout_kernels.grouped_experts import grouped_experts
from rollout_kernels.paged_decode import DecodeWorkspace, paged_decode
from rollout_kernels.paged_prefill import paged_prefill
from rollout_kernels.qk_norm_rope import HeadNorms, rotate_and_store
from rollout_kernels.shared_prefix_decode import SharedState, shared_prefix_decode
from rollout_kernels.shared_prefixes import SharedPrefixes
from rollout_kernels.silu_mul import silu_mul

from .experts import Experts
from .norm import RMSNorm
from .router import Router
from .step import AttentionLayer


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceBatch:
    """One step's indices on the model's device, all int32; decodes come first, then prefill chunks, in item order."""

    positions: torch.Tensor
    """(T)."""
    slots: torch.Tensor
    """(T): block * S + offset of each token's key and value; -1: a row of padding."""
    block_tables: torch.Tensor
    """(N, most blocks)."""
    seq_lens: torch.Tensor
    """(N): tokens of each sequence with this step's; 0: a row of padding."""
    num_decodes: int
    """The first this many sequences have one token, their last."""
    query_starts: torch.Tensor | None
    """(N - num_decodes + 1): where each later sequence's tokens start, counted from row `num_decodes`; None: none."""
    max_query_len: int
    """Most tokens of a later sequence in this step."""
    max_len: int
    """No decoding sequence is longer."""
    max_later_len: int = 0
    """No later sequence is longer."""
    shared: SharedPrefixes | None = None
    """Prefixes that decoding sequences share, and that are read once for all of them; None: each reads its own."""
    order: torch.Tensor | None = None
    """(num_decodes): the decoding sequences, those with most to read first; None: as they are."""
    captured: bool = False
    """One of a few sizes, for which kernels of its own are worth their compilation."""


class TritonStep:
    """`LayerStep` in fused kernels."""

    def __init__(
        self,
        batch: DeviceBatch,
        *,
        pools: Sequence[torch.Tensor],
        routes: torch.Tensor | None = None,
        rotary_table: torch.Tensor,
        workspace: DecodeWorkspace,
        shared_state: SharedState | None = None,
        deterministic: bool = False,
    ) -> None:
        self.batch = batch
        """What the step is over."""
        self._pools = pools
        self._routes = routes
        self._table = rotary_table
        self._workspace = workspace
        self._shared_state = shared_state
        self._deterministic = deterministic

    def take(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Fresh memory: what a captured graph holds must be its own."""
        return torch.empty(shape, dtype=self._table.dtype, device=self._table.device)

    def norm(self, residual: torch.Tensor, x: torch.Tensor | None, norm: RMSNorm) -> torch.Tensor:
        """The sum and its norm in one kernel; the norm goes where `x` was."""
        out = torch.empty_like(residual) if x is None else x
        return add_rms_norm(residual, x, norm.weight, norm.eps, out)

    def attend(self, qkv: torch.Tensor, layer: AttentionLayer) -> torch.Tensor:
        """One kernel up to the pool, then one for the decodes and one for the rest."""
        batch, pool = self.batch, self._pools[layer.index]
        norms = None
        if layer.q_norm is not None and layer.k_norm is not None:
            norms = HeadNorms(
                query=layer.q_norm.weight, key=layer.k_norm.weight, eps=layer.q_norm.eps
            )
        queries = rotate_and_store(
            qkv, pool, self._table, batch.positions, batch.slots, norms=norms
        ).unflatten(1, (layer.num_heads, layer.head_dim))
        return self.attention(queries, pool, layer).flatten(1)

    def attention(
        self, queries: torch.Tensor, pool: torch.Tensor, layer: AttentionLayer
    ) -> torch.Tensor:
        """queries (T, H, D), rotated, over what `pool` holds, this step's keys and values among it -> (T, H, D)."""
        batch, num = self.batch, self.batch.num_decodes
        out = torch.empty(queries.shape, dtype=queries.dtype, device=queries.device)
        if num:
            self._decode(queries[:num], pool, out[:num], layer)
        if batch.query_starts is not None:
            paged_prefill(
                queries[num:],
                pool,
                batch.block_tables[num:],
                batch.query_starts,
                batch.seq_lens[num:],
                out[num:],
                scale=layer.scale,
                window=layer.sliding_window,
                max_query_len=batch.max_query_len,
                deterministic=self._deterministic,
            )
        return out

    def _decode(
        self, queries: torch.Tensor, pool: torch.Tensor, out: torch.Tensor, layer: AttentionLayer
    ) -> None:
        batch, num = self.batch, queries.shape[0]
        tables, lengths = batch.block_tables[:num], batch.seq_lens[:num]
        if batch.shared is not None and layer.sliding_window is None:
            assert self._shared_state is not None
            shared_prefix_decode(
                queries,
                pool,
                tables,
                lengths,
                out,
                scale=layer.scale,
                shared=batch.shared,
                workspace=self._workspace,
                state=self._shared_state,
                deterministic=self._deterministic,
                max_len=batch.max_len,
                order=batch.order,
            )
            return
        paged_decode(
            queries,
            pool,
            tables,
            lengths,
            out,
            scale=layer.scale,
            window=layer.sliding_window,
            workspace=self._workspace,
            deterministic=self._deterministic,
            max_len=batch.max_len,
            order=batch.order,
            few_kernels=not batch.captured,
        )

    def experts(
        self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, experts: Experts
    ) -> torch.Tensor:
        """Four kernels, whatever the number of experts."""
        return grouped_experts(
            x,
            weights,
            ids,
            experts.gate_up,
            experts.down,
            first_expert=experts.first,
            config=EXACT if self._deterministic else None,
        )

    def route(
        self, x: torch.Tensor, router: Router, layer: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A product and a kernel, which keeps ids beside the tokens' keys. Padding goes nowhere."""
        return choose_experts(
            router.logits(x),
            router.bias,
            router.routing,
            slots=self.batch.slots,
            routes=None if self._routes is None else self._routes[:, layer],
        )

    def gate(self, fused: torch.Tensor) -> torch.Tensor:
        """One kernel."""
        out = torch.empty(
            (fused.shape[0], fused.shape[1] // 2), dtype=fused.dtype, device=fused.device
        )
        return silu_mul(fused, out)
