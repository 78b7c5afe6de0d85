"""The backend around torch's own paged attention, `torch.nn.attention.varlen.varlen_attn`.

Everything else of a step is that of the triton backend: fused norms, rotation and KV writes, sampling, CUDA graphs.
Prefixes that requests share are read by each of them.

What torch offers: 2.12 and later take `block_table` and `seqused_k`; before, nothing here is paged. FlashAttention 2,
which torch contains, reads float16 and bfloat16, heads of a multiple of 8 up to 256, and pages of a multiple of 256
tokens, on GPUs of compute capability 8.0 and later. Another implementation, which a process has activated with
`torch.nn.attention.activate_flash_attention_impl`, has pages of any size.

N sequences, T tokens, H query heads, K KV heads, D head size, S block size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from ..layers.step import AttentionLayer
from ..layers.triton_step import DeviceBatch, TritonStep
from .attention_backend import BackendContext, BackendNeeds
from .triton_backend import TritonBackend

PAGE = 256
"""Tokens of a page in FlashAttention 2, or a multiple."""


def paged_attention() -> Callable[..., Any] | None:
    """torch's `varlen_attn`, if it reads through block tables."""
    try:
        from torch.nn.attention import varlen
    except ImportError:
        return None
    given = inspect.signature(varlen.varlen_attn).parameters
    return varlen.varlen_attn if {"block_table", "seqused_k", "enable_gqa"} <= set(given) else None


def is_built_in() -> bool:
    """Nobody has put another implementation in the place of FlashAttention 2."""
    current: Callable[[], str | None] = torch.nn.attention.current_flash_attention_impl
    return current() is None


def why_not(needs: BackendNeeds) -> str | None:
    """What stands against this backend on CUDA: what was got and what was expected; None: nothing."""
    if paged_attention() is None:
        return f"torch {torch.__version__}, whose varlen_attn has no block tables, expected 2.12 or later"
    if torch.cuda.is_available() and torch.cuda.get_device_capability(needs.device) < (8, 0):
        name = torch.cuda.get_device_name(needs.device)
        return f"{name}, expected compute capability 8.0 or later"
    if needs.dtype not in (torch.float16, torch.bfloat16):
        return f"{needs.dtype}, expected torch.float16 or torch.bfloat16"
    if needs.head_dim % 8 or needs.head_dim > 256:
        return f"heads of {needs.head_dim}, expected a multiple of 8 up to 256"
    if is_built_in() and needs.block_size % PAGE:
        return f"block_size {needs.block_size}, expected a multiple of {PAGE}"
    return None


class FlashStep(TritonStep):
    """`LayerStep` in fused kernels, but for attention."""

    def __init__(
        self,
        batch: DeviceBatch,
        *,
        attend: Callable[..., Any],
        starts: torch.Tensor,
        rooms: torch.Tensor | None,
        **parts: Any,
    ) -> None:
        """attend: torch's `varlen_attn`. starts: (at least N + 1) int32, 0, 1, 2, ..., where decoding sequences begin.

        rooms: (at least N + 1) int32, sums of lengths that no sequence exceeds: FlashAttention 2 wants such, and reads
        `seqused_k` instead; None for another implementation, which forbids them. parts: as `TritonStep`.
        """
        super().__init__(batch, **parts)
        self._attend = attend
        self._starts = starts
        self._rooms = rooms

    def attention(
        self, queries: torch.Tensor, pool: torch.Tensor, layer: AttentionLayer
    ) -> torch.Tensor:
        """One call for the decodes, which packs the heads of a group, and one for the rest."""
        batch, num = self.batch, self.batch.num_decodes
        parts = []
        if num:
            # All keys, of one query, are the causal ones; told so, FlashAttention packs the heads of a group.
            parts.append(
                self._call(
                    *(queries[:num], pool, layer, slice(None, num), self._starts[: num + 1]),
                    max_q=1,
                    max_k=batch.max_len,
                    causal=layer.sliding_window is not None,
                )
            )
        if batch.query_starts is not None:
            parts.append(
                self._call(
                    *(queries[num:], pool, layer, slice(num, None), batch.query_starts),
                    max_q=batch.max_query_len,
                    max_k=batch.max_later_len,
                    causal=True,
                )
            )
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _call(
        self,
        queries: torch.Tensor,
        pool: torch.Tensor,
        layer: AttentionLayer,
        rows: slice,
        starts: torch.Tensor,
        *,
        max_q: int,
        max_k: int,
        causal: bool,
    ) -> torch.Tensor:
        window = layer.sliding_window
        lengths = self.batch.seq_lens[rows]
        rooms = None if self._rooms is None else self._rooms[: lengths.shape[0] + 1]
        out: torch.Tensor = self._attend(
            *(queries, pool[:, :, 0], pool[:, :, 1], starts, rooms, max_q, max_k),
            scale=layer.scale,
            window_size=(-1 if window is None else window - 1, 0 if causal else -1),
            enable_gqa=layer.num_heads != layer.num_kv_heads,
            seqused_k=lengths,
            block_table=self.batch.block_tables[rows],
        )
        return out


class FlashBackend(TritonBackend):
    """`AttentionBackend` on CUDA, where `why_not` finds nothing against it."""

    name = "flash"
    shares_prefixes = False

    def __init__(self, context: BackendContext) -> None:
        super().__init__(context)
        attend = paged_attention()
        assert attend is not None, "looked at by why_not"
        self._attend = attend
        counted = torch.arange(context.max_batch + 1, device=context.device)
        self._starts = counted.int()
        self._rooms: torch.Tensor | None = None
        if is_built_in():
            longest = context.config.max_position_embeddings
            self._rooms = (counted * longest).clamp(max=torch.iinfo(torch.int32).max).int()

    def step(self, batch: DeviceBatch) -> FlashStep:
        """The step over a batch that is on the device."""
        return FlashStep(
            batch, attend=self._attend, starts=self._starts, rooms=self._rooms, **self._parts()
        )
