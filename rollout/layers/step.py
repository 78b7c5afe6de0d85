"""What the layers ask of a step: everything between the matrix products, planned once and called per layer.

There are two ways to compute it, torch operations (`torch_step`) and fused kernels (`triton_step`), which differ in
speed and rounding alone.

T tokens of a step, E hidden size, H query heads and K KV heads of this rank, D head size, I feed-forward width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from .experts import Experts
from .norm import RMSNorm
from .router import Router


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionLayer:
    """Attention of one layer, as far as a step needs to know it. Holds no parameters of its own."""

    index: int
    """Position among the layers; also that of its KV pool."""
    num_heads: int
    """H."""
    num_kv_heads: int
    """K."""
    head_dim: int
    """D."""
    sliding_window: int | None
    """Tokens that a query looks back, itself included; None: all."""
    q_norm: RMSNorm | None
    """Norm of each query head before rotation; None: the model has none."""
    k_norm: RMSNorm | None
    """Norm of each key head before rotation; None: the model has none."""

    @property
    def scale(self) -> float:
        """Factor of the scores."""
        return float(self.head_dim**-0.5)


class LayerStep(Protocol):
    """One step; made by an `AttentionBackend`, read by all layers in turn."""

    def take(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Memory of unspecified contents in the model's dtype, valid until `name` is taken again."""

    def norm(self, residual: torch.Tensor, x: torch.Tensor | None, norm: RMSNorm) -> torch.Tensor:
        """residual (T, E) += x (T, E), in place, where there is an x; then the norm of the residual, (T, E)."""

    def attend(self, qkv: torch.Tensor, layer: AttentionLayer) -> torch.Tensor:
        """qkv (T, (H + 2 K) D) -> (T, H D): norm and rotate, write keys and values to the layer's pool, attend."""

    def experts(
        self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, experts: Experts
    ) -> torch.Tensor:
        """x (T, E), weights (T, k) float32, ids (T, k) int64 -> what this rank's experts add, (T, E), the caller's."""

    def route(
        self, x: torch.Tensor, router: Router, layer: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x (T, E) -> weights (T, k) float32 and expert ids (T, k) int64; ids are kept where somebody asked for them.

        `layer`: its index among the decoder's layers. A row of padding may go to no expert: its ids are too great.
        """

    def gate(self, fused: torch.Tensor) -> torch.Tensor:
        """fused (T, 2 I), gate before up -> silu(gate) * up, (T, I)."""
