"""Runs scheduled batches through the model: the only place where the engine's bookkeeping becomes tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from weight_sync.layout.weight_map import WeightMap

from ..layers.single_group import SingleGroup, TensorParallelGroup
from ..models.build import build_model
from ..models.decoder import Decoder
from ..models.model_config import ModelConfig
from ..scheduling.batch import ScheduledBatch
from .attention_backend import BackendContext, DrawnTokens, make_backend, resolve_backend
from .kv_pool import KVPool


class ModelRunner:
    """One rank's model, KV pool and scratch memory.

    Every tensor-parallel rank runs the same batches in the same order. Not thread-safe: the engine loop's thread alone
    calls `forward`, `compute_logits` and `copy_blocks`.
    """

    def __init__(
        self,
        model_config: ModelConfig,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        block_size: int,
        num_blocks: int,
        tp: TensorParallelGroup | None = None,
        attention_backend: str = "auto",
    ) -> None:
        self.model_config = model_config
        self.dtype = dtype
        self.device = torch.device(device)
        self.block_size = block_size
        self.tp = tp or SingleGroup()
        self.model: Decoder = build_model(model_config, dtype, self.device, self.tp)
        self.kv_pool = KVPool(
            num_layers=model_config.num_layers,
            num_blocks=num_blocks,
            block_size=block_size,
            num_kv_heads=self.model.num_kv_heads,
            head_dim=model_config.head_dim,
            dtype=dtype,
            device=self.device,
        )
        self.backend = make_backend(
            resolve_backend(attention_backend, self.device),
            BackendContext(
                config=model_config,
                model=self.model,
                kv_pool=self.kv_pool,
                dtype=dtype,
                device=self.device,
                block_size=block_size,
            ),
        )

    @property
    def weight_map(self) -> WeightMap:
        """Where each checkpoint tensor lives in this rank's parameters."""
        return self.model.weight_map

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return self.model_config.num_layers

    @property
    def kv_bytes_per_block(self) -> int:
        """Bytes of one KV block on this rank, all layers."""
        return KVPool.bytes_per_block(
            num_layers=self.model_config.num_layers,
            block_size=self.block_size,
            num_kv_heads=self.model.num_kv_heads,
            head_dim=self.model_config.head_dim,
            dtype=self.dtype,
        )

    def forward(self, batch: ScheduledBatch, drawn: DrawnTokens | None = None) -> torch.Tensor:
        """Compute all tokens of `batch` and store their keys and values, after the batch's own block copies.

        Tokens that the host does not know yet are those of `drawn`. Returns hidden states (T, hidden), rows in item
        order: a fresh tensor, the caller's to keep.
        """
        hidden = torch.empty(
            (batch.num_tokens, self.model_config.hidden_size), dtype=self.dtype, device=self.device
        )
        with torch.inference_mode():
            planned = self.backend.plan(batch, drawn)
            states = self.model(planned.token_ids, planned.step)
            if planned.item_rows is None:
                return hidden.copy_(states)
            return torch.index_select(states, 0, planned.item_rows, out=hidden)

    def compute_logits(self, hidden_rows: torch.Tensor) -> torch.Tensor:
        """hidden_rows (R, hidden) -> float32 logits (R, vocab): a fresh tensor, the caller's to overwrite."""
        with (
            torch.no_grad()
        ):  # Not inference mode: its tensors could not be written to outside of it.
            return self.model.logits(hidden_rows).float()

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy KV blocks, (source, destination), in all layers."""
        with torch.inference_mode():
            self.kv_pool.copy_blocks(pairs)

    def refresh_derived_state(self) -> None:
        """Recompute what is a function of the parameters; to be called after every change of them."""
        self.model.refresh_derived_state()
