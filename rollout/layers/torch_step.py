"""A step in torch operations, on any device; on a CPU the fastest there is.

T tokens, E hidden size, H query heads, K KV heads, D head size, I feed-forward width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import silu

from .attention import PagedAttention, PagedStep
from .experts import Experts, run_experts
from .norm import RMSNorm
from .rotary import Angles, rotate_
from .router import Router
from .step import AttentionLayer


class TorchStep:
    """`LayerStep` in torch operations over scratch memory that the runner keeps."""

    def __init__(
        self,
        *,
        paged: PagedStep,
        angles: Angles,
        pools: Sequence[torch.Tensor],
        routes: torch.Tensor | None = None,
    ) -> None:
        self._paged = paged
        self._angles = angles
        self._pools = pools
        self._routes = routes
        self._workspace = paged.workspace

    def take(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Scratch memory."""
        return self._workspace.take(name, shape)

    def norm(self, residual: torch.Tensor, x: torch.Tensor | None, norm: RMSNorm) -> torch.Tensor:
        """The norm, in scratch memory that the next norm overwrites."""
        if x is not None:
            residual.add_(x)
        normed = self._workspace.take("normed", tuple(residual.shape))
        return norm(residual, normed, self._workspace)

    def attend(self, qkv: torch.Tensor, layer: AttentionLayer) -> torch.Tensor:
        """Queries and keys are normed and rotated where they lie."""
        num_heads, workspace = layer.num_heads, self._workspace
        heads = qkv.view(qkv.shape[0], -1, layer.head_dim)
        rotated = heads[:, : num_heads + layer.num_kv_heads]
        queries, keys = rotated[:, :num_heads], rotated[:, num_heads:]
        if layer.q_norm is not None and layer.k_norm is not None:
            layer.q_norm(queries, queries, workspace)
            layer.k_norm(keys, keys, workspace)
        rotate_(rotated, self._angles, workspace)
        kv = qkv[:, num_heads * layer.head_dim :]
        return PagedAttention(layer).forward(queries, kv, self._pools[layer.index], self._paged)

    def experts(
        self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, experts: Experts
    ) -> torch.Tensor:
        """A product for each matrix of each expert that is used."""
        return run_experts(x, weights, ids, experts)

    def route(
        self, x: torch.Tensor, router: Router, layer: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The router; ids are kept beside the tokens' keys."""
        weights, ids = router(x)
        if self._routes is not None:
            self._routes[self._paged.slots, layer] = ids.to(self._routes.dtype)
        return weights, ids

    def gate(self, fused: torch.Tensor) -> torch.Tensor:
        """In place, in the first half."""
        gate, up = fused.chunk(2, -1)
        return silu(gate, inplace=True).mul_(up)
