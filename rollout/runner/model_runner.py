"""Runs scheduled batches through the model: the only place where the engine's bookkeeping becomes tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from weight_sync.layout.weight_map import WeightMap

from ..layers.attention import PagedStep
from ..layers.single_group import SingleGroup, TensorParallelGroup
from ..layers.workspace import Workspace
from ..models.build import build_model
from ..models.decoder import Decoder, DecoderStep
from ..models.model_config import ModelConfig
from ..scheduling.batch import ScheduledBatch
from .forward_batch import AttentionPlanner, ForwardBatch, GroupLimits, Ints
from .kv_pool import KVPool

_GATHER_BYTES = 8 << 20
"""Keys and values gathered at once; measured flat from 4 to 16 MB with a last-level cache of 32 MB."""
_PADDING_BYTES = 512 << 10
"""Keys and values gathered in vain per call; takes about as long as the call itself."""
_PADDED_QUERIES = 8192
"""Padded query tokens in one call."""


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
        self._workspace = Workspace(dtype, self.device)
        block_bytes = self.kv_bytes_per_block // model_config.num_layers
        self.limits = GroupLimits(
            max_blocks=max(1, _GATHER_BYTES // block_bytes),
            max_padding_blocks=max(1, _PADDING_BYTES // block_bytes),
            max_queries=_PADDED_QUERIES,
        )
        """When sequences share a kernel call; a matter of speed alone, and may be changed between steps."""

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

    def forward(self, batch: ScheduledBatch) -> torch.Tensor:
        """Compute all tokens of `batch` and store their keys and values, after the batch's own block copies.

        Returns hidden states (T, hidden), rows in item order: a fresh tensor, the caller's to keep.
        """
        hidden = torch.empty(
            (batch.num_tokens, self.model_config.hidden_size), dtype=self.dtype, device=self.device
        )
        with torch.inference_mode():
            self.kv_pool.copy_blocks(batch.block_copies)
            host = ForwardBatch.of(batch.items, self.block_size)
            self.kv_pool.clear_blocks(self._upload(host.partial_blocks))
            rows = self._upload(host.item_rows)
            return torch.index_select(self.model(self._step(host)), 0, rows, out=hidden)

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

    def _step(self, host: ForwardBatch) -> DecoderStep:
        plans = {
            window: AttentionPlanner(host, window, self.block_size, self.limits).groups(
                self.dtype, self.device
            )
            for window in dict.fromkeys(self.model_config.sliding_windows)
        }
        return DecoderStep(
            token_ids=self._upload(host.token_ids),
            positions=self._upload(host.positions),
            paged=PagedStep(slots=self._upload(host.slots), plans=plans, workspace=self._workspace),
            pools=self.kv_pool.layers,
        )

    def _upload(self, indices: Ints) -> torch.Tensor:
        return torch.from_numpy(indices).to(self.device)
