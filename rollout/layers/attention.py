"""Attention over a paged KV cache, in plain torch operations.

T tokens, B sequences of a group, Q queries per sequence, L keys per sequence, H query heads, K KV heads, G = H / K,
D head size, S block size.

Sequences of similar lengths form a group. The group's blocks are gathered into one reused buffer (B, L, 2, K, D), keys
and values interleaved so that one gather and one write serve both, and a fused kernel attends over strided views of
it. With one query per sequence the G query heads of a KV head are folded into the query axis, so grouped queries read
each key once. Measured on two cores, 512 sequences of 124 tokens (B=512, H=8, K=4, D=64, 130 MB of float32 KV): 6.5 ms
so; 7.3 ms with keys and values apart; 13.2 ms with batched products and a softmax. The gather alone takes 2.5 ms.
Sparse products that need no gather are no faster: 2.1 ms for the values (`embedding_bag`), but 8.3 ms for the keys
(`sampled_addmm`). Huge pages change nothing. In the step of a 25M-parameter model attention is 40 % and products 53 %.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch.nn.functional import scaled_dot_product_attention

from .step import AttentionLayer
from .workspace import Workspace


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionGroup:
    """Sequences that one kernel call attends for; their tokens are neighbours in the step's row order."""

    first_row: int
    """First of its rows among the step's T rows."""
    last_row: int
    """One past its last row."""
    batch: int
    """B."""
    query_len: int
    """Q, of the longest."""
    blocks: torch.Tensor
    """(B * L / S) int64: the blocks to gather; short sequences repeat a block of their own."""
    kv_len: int
    """L, of which the mask lets each query see its own part."""
    mask: torch.Tensor | None
    """(B, 1, Q, L) in the model's dtype, 0 or -inf; None: query i sees keys 0 to i."""
    padded_rows: torch.Tensor | None = None
    """(B * Q) int64, relative to `first_row`: the row behind each padded query; None when all have Q queries."""
    real_rows: torch.Tensor | None = None
    """(rows) int64: where in the padded output (B * Q) each row's result is; None as above."""


AttentionPlan = Sequence[AttentionGroup]
"""The groups of one step, which cover its rows in order; layers with the same sliding window share a plan."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedStep:
    """What attention needs to know about one step; built once, read by all layers."""

    slots: torch.Tensor
    """(T) int64: where in the flat KV cache each token's key and value go."""
    plans: Mapping[int | None, AttentionPlan]
    """By sliding window; None: no window."""
    workspace: Workspace = field(repr=False)
    """Scratch memory."""


class PagedAttention:
    """Attention over one layer's part of the KV pool; called once per layer."""

    def __init__(self, layer: AttentionLayer) -> None:
        self.num_heads = layer.num_heads
        self.num_kv_heads = layer.num_kv_heads
        self.head_dim = layer.head_dim
        self.sliding_window = layer.sliding_window
        self.scale = layer.scale

    def forward(
        self, queries: torch.Tensor, kv: torch.Tensor, pool: torch.Tensor, step: PagedStep
    ) -> torch.Tensor:
        """Write kv (T, 2 * K * D) into the pool, then attend: queries (T, H, D) -> (T, H * D) in scratch memory.

        `pool` is (blocks, S, 2, K, D); all keys that a query may see must be in it, or in `kv`.
        """
        num_blocks, block_size = pool.shape[:2]
        pool.view(num_blocks * block_size, -1).index_copy_(0, step.slots, kv)
        out = step.workspace.take("attention", (queries.shape[0], self.num_heads, self.head_dim))
        blocks = pool.view(num_blocks, -1)
        for group in step.plans[self.sliding_window]:
            rows = slice(group.first_row, group.last_row)
            keys, values = self._gather(blocks, group, step.workspace)
            if group.query_len == 1:
                self._decode(queries[rows], keys, values, group, out[rows])
            else:
                self._prefill(queries[rows], keys, values, group, out[rows])
        return out.view(queries.shape[0], -1)

    def _gather(
        self, blocks: torch.Tensor, group: AttentionGroup, workspace: Workspace
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a group, each (B, K, L, D), as views of one buffer."""
        num_blocks = group.blocks.shape[0]
        gathered = workspace.take("gathered", (num_blocks, blocks.shape[1]))
        torch.index_select(blocks, 0, group.blocks, out=gathered)
        kv = gathered.view(group.batch, -1, 2, self.num_kv_heads, self.head_dim)[:, : group.kv_len]
        return kv[:, :, 0].transpose(1, 2), kv[:, :, 1].transpose(1, 2)

    def _decode(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        group: AttentionGroup,
        out: torch.Tensor,
    ) -> None:
        folded = (group.batch, self.num_kv_heads, -1, self.head_dim)
        attended = scaled_dot_product_attention(
            queries.view(folded), keys, values, attn_mask=group.mask, scale=self.scale
        )
        out.view(folded).copy_(attended)

    def _prefill(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        group: AttentionGroup,
        out: torch.Tensor,
    ) -> None:
        if group.padded_rows is not None:
            queries = queries.index_select(0, group.padded_rows)
        padded = (group.batch, group.query_len, self.num_heads, self.head_dim)
        attended = scaled_dot_product_attention(
            queries.view(padded).transpose(1, 2),
            keys,
            values,
            attn_mask=group.mask,
            is_causal=group.mask is None,
            scale=self.scale,
            enable_gqa=self.num_heads != self.num_kv_heads,
        ).transpose(1, 2)
        if group.real_rows is None:
            out.view(padded).copy_(attended)
        else:
            flat = attended.reshape(-1, self.num_heads, self.head_dim)
            torch.index_select(flat, 0, group.real_rows, out=out)
