"""Runs scheduled batches through the model: the only place where the engine's bookkeeping becomes tensors."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from weight_sync.layout.weight_map import WeightMap

from ..layers.embedding import VocabParallelEmbedding
from ..layers.linear import ColumnParallelLinear, RowParallelLinear
from ..layers.router import Router
from ..layers.sampler import PendingSample, Sampler, TokenSampler
from ..layers.single_group import SingleGroup, TensorParallelGroup
from ..models.build import build_model
from ..models.decoder import Decoder
from ..models.feed_forward import MixtureOfExperts
from ..models.loader import get_model_loader
from ..models.loader_config import LoadConfig
from ..models.model_config import ModelConfig
from ..models.sharded_state import ShardedStateLoader, copy_companions
from ..sampling_params import SamplingParams
from ..scheduling.batch import ScheduledBatch, ScheduledItem
from ..scheduling.request import Request
from .attention_backend import AttentionBackend, BackendContext, DrawnTokens
from .backend_registry import make_backend, resolve_backend
from .capture_progress import Progress
from .kv_pool import KVPool
from .profile_ranges import LayerRanges, Named

if TYPE_CHECKING:  # loads triton, which only CUDA needs
    from .cuda_graph_runner import CudaGraphRunner

_FEW_TOKENS = 64
_MULTIPLYING = (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    Router,
    MixtureOfExperts,
)
"""Modules with a `product` of their own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchedStep:
    """A step that is under way on the device; either its hidden states, or its logits."""

    hidden: torch.Tensor | None = None
    """(T, hidden), rows in item order."""
    logits: torch.Tensor | None = None
    """(N, V), a row per item; valid until the next step is launched."""
    sample: PendingSample | None = None
    """A token for every item, drawn from `logits`; None: still to be drawn."""


class ModelRunner:
    """One rank's model, KV pool and scratch memory.

    Every tensor-parallel rank runs the same batches in the same order. Not thread-safe: the engine loop's thread alone
    calls `forward` and `compute_logits`.
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
        ep_size: int = 1,
        keep_routes: bool = False,
        attention_backend: str = "auto",
        max_batch: int = 256,
        deterministic: bool = False,
    ) -> None:
        self.model_config = model_config
        self.dtype = dtype
        self.device = torch.device(device)
        self.block_size = block_size
        self.tp = tp or SingleGroup()
        self.deterministic = deterministic
        self._model_path: str | Path | None = None
        self.model: Decoder = build_model(model_config, dtype, self.device, self.tp, ep_size)
        if deterministic or self.device.type == "cuda":
            self._use_products_of_kernels()
        self._keep_routes = keep_routes
        self._attention_backend = attention_backend
        self._max_batch = max_batch
        self.sampler: TokenSampler = Sampler()
        """Draws from this model's logits."""
        self.graphs: CudaGraphRunner | None = None
        """Decode steps in one piece; None: there are none."""
        self.counts_experts = False
        """`count_experts` has begun."""
        self._ranges: LayerRanges | None = None
        with ExitStack() as memory:  # Given back where the rest cannot be made.
            memory.callback(self.model.arena.free)
            self.kv_pool = self.init_memory_pool(num_blocks)
            memory.callback(lambda: self.kv_pool.free())  # whichever it is by then
            self.backend = self.init_attention_backend(attention_backend, max_batch)
            self._init_device_sampler(max_batch)
            self._memory = memory.pop_all()

    def free(self) -> None:
        """Give weights and KV pool back to the device, after all work that uses them, and let go of graphs.

        Memory of a GPU that was mapped by hand does not go with its tensors. The runner is of no more use. Safe to
        repeat.
        """
        self.forget_graphs()
        self._memory.close()

    def init_memory_pool(self, num_blocks: int) -> KVPool:
        """Memory for the keys and values of `num_blocks` blocks, all layers."""
        moe = self.model_config.moe
        return KVPool(
            num_layers=self.model_config.num_layers,
            num_blocks=num_blocks,
            block_size=self.block_size,
            num_kv_heads=self.model.num_kv_heads,
            head_dim=self.model_config.head_dim,
            dtype=self.dtype,
            device=self.device,
            experts_per_token=moe.router.top_k if moe is not None and self._keep_routes else 0,
        )

    def resize_memory_pool(self, num_blocks: int) -> None:
        """Another pool, whose predecessor was freed; what knows that one is made anew. Comes before graphs."""
        assert self.graphs is None, "graphs read the pool at its address"
        self.kv_pool = self.init_memory_pool(num_blocks)
        self.backend = self.init_attention_backend(self._attention_backend, self._max_batch)
        self._init_device_sampler(self._max_batch)

    def run_largest_step(self, num_tokens: int, num_rows: int, context_length: int) -> None:
        """Compute prompts of `num_tokens` in all, as far as the pool holds them, and logits of `num_rows` of them.

        Keys and values go into the first blocks; nothing may be in them. All ranks call it.
        """
        size, items, first = self.block_size, [], 0
        num_blocks = self.kv_pool.memory.shape[1]
        while num_tokens > 0 and first < num_blocks:
            length = min(num_tokens, context_length, (num_blocks - first) * size)
            request = Request(rid=f"{first}", prompt_ids=[0] * length, params=SamplingParams())
            end = first - (-length // size)
            request.block_ids.extend(range(first, end))
            items.append(ScheduledItem(request, 0, length, True))
            first, num_tokens = end, num_tokens - length
        total = sum(item.length for item in items)
        hidden = self.forward(ScheduledBatch(items, [], total, 0))
        self.sampling_logits(hidden[:num_rows])

    def compile_steps(self, num_tokens: int, num_rows: int, context_length: int) -> None:
        """Compile what `run_largest_step` of up to so many tokens launches, side by side; each rank alone."""
        if not self.backend.on_device:
            return
        from rollout_kernels.compiling import compile_ahead

        sizes = [num_tokens]
        while self.model_config.moe is not None and sizes[-1] > _FEW_TOKENS:
            sizes.append(
                sizes[-1] // 2
            )  # Tiles of experts have other shapes for other numbers of tokens.
        with self.model.tp.muted(), self.model.few_layers(), compile_ahead():
            for size in sizes:
                self.run_largest_step(size, min(num_rows, size), context_length)

    def init_attention_backend(self, name: str, max_batch: int) -> AttentionBackend:
        """The backend of that name ("auto": the device's), for decode batches of up to `max_batch` requests."""
        return make_backend(
            resolve_backend(name, self.device),
            BackendContext(
                config=self.model_config,
                model=self.model,
                kv_pool=self.kv_pool,
                dtype=self.dtype,
                device=self.device,
                block_size=self.block_size,
                max_batch=max_batch,
                deterministic=self.deterministic,
            ),
        )

    def _use_products_of_kernels(self) -> None:
        from rollout_kernels.invariant_matmul import invariant_linear

        from ..layers.few_rows import project_few

        for module in self.model.modules():
            if isinstance(module, _MULTIPLYING):
                module.product = invariant_linear if self.deterministic else project_few

    def load_model(self, model_path: str | Path, load_config: LoadConfig) -> None:
        """Fill the parameters, as `load_config` says, from the model's folder; raises `CheckpointError`."""
        get_model_loader(load_config).load_model(self.model, model_path)
        self._model_path = model_path

    def save_sharded_model(
        self, path: str | Path, pattern: str | None = None, max_size: int | None = None
    ) -> list[Path]:
        """Write this rank's parameters (`ShardedStateLoader.save_model`), and on rank 0 the model's other files."""
        if self.tp.rank == 0 and self._model_path is not None:
            copy_companions(self._model_path, path)
        return ShardedStateLoader.save_model(self.model, path, pattern, max_size)

    def _init_device_sampler(self, max_batch: int) -> None:
        if self.backend.on_device:
            from ..layers.device_sampler import DeviceSampler
            from .triton_backend import TritonBackend

            assert isinstance(self.backend, TritonBackend)
            self.sampler = DeviceSampler(
                max_rows=max_batch,
                vocab_size=self.model_config.vocab_size,
                device=self.device,
                upload=self.backend.staging.upload,
            )

    def init_device_graphs(self, context_length: int, progress: Progress | None = None) -> None:
        """Make decode steps one piece, captured where the device has graphs; weights need not be loaded."""
        if self.backend.on_device and self.model_config.num_labels is None:
            from ..layers.device_sampler import DeviceSampler
            from .cuda_graph_runner import CudaGraphRunner
            from .triton_backend import TritonBackend

            assert isinstance(self.backend, TritonBackend)
            assert isinstance(self.sampler, DeviceSampler)
            self.graphs = CudaGraphRunner(
                self.backend,
                self.sampler,
                max_batch=self.sampler.max_rows,
                context_length=context_length,
            )
            self.graphs.capture(progress)

    def forget_graphs(self) -> None:
        """Let go of captured steps; to be called before the ranks' group is closed."""
        if self.graphs is not None:
            self.graphs.forget()

    @property
    def weight_map(self) -> WeightMap:
        """Where each checkpoint tensor lives in this rank's parameters."""
        return self.model.weight_map

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return self.model_config.num_layers

    def launch(self, batch: ScheduledBatch, drawn: DrawnTokens | None) -> LaunchedStep:
        """Start a step; on CUDA nothing waits for it. Tokens that the host does not know yet are those of `drawn`."""
        if batch.forward_mode.is_decode():
            return self.forward_decode(batch, drawn)
        return self.forward_extend(batch, drawn)

    def forward_decode(self, batch: ScheduledBatch, drawn: DrawnTokens | None) -> LaunchedStep:
        """Start a step of decodes alone: as one piece, with its draws, where there are graphs that can run it."""
        graphs = self.graphs
        if graphs is None or self.counts_experts or not graphs.can_run(batch):
            return self.forward_extend(batch, drawn)
        return LaunchedStep(logits=graphs.logits, sample=graphs.replay(batch, drawn))

    def forward_extend(self, batch: ScheduledBatch, drawn: DrawnTokens | None) -> LaunchedStep:
        """Start a step of any items, layer by layer."""
        return LaunchedStep(hidden=self.forward(batch, drawn))

    def index(self, values: Sequence[int]) -> torch.Tensor:
        """int64 indices on the device."""
        staging = getattr(self.backend, "staging", None)
        if staging is None:
            return torch.tensor(values, device=self.device)
        uploaded: torch.Tensor = staging.upload([np.array(values, np.int64)])[0]
        return uploaded

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
            step = planned.step if self._ranges is None else self._ranges.over(planned.step)
            states = self.model(planned.token_ids, step, planned.given)
            if planned.item_rows is None:
                return hidden.copy_(states)
            return torch.index_select(states, 0, planned.item_rows, out=hidden)

    def sampling_logits(self, hidden_rows: torch.Tensor) -> torch.Tensor:
        """hidden_rows (R, hidden) -> logits (R, vocab) as the sampler takes them."""
        if isinstance(self.sampler, Sampler):
            return self.compute_logits(hidden_rows)
        with torch.inference_mode():
            return self.model.logits(hidden_rows)

    def compute_logits(self, hidden_rows: torch.Tensor) -> torch.Tensor:
        """hidden_rows (R, hidden) -> float32 logits (R, vocab), of a classifier (R, num_labels): a fresh tensor, the
        caller's to overwrite."""
        with (
            torch.no_grad()
        ):  # Not inference mode: its tensors could not be written to outside of it.
            return self.model.logits(hidden_rows).float()

    def count_experts(self, counting: bool) -> torch.Tensor | None:
        """Begin from zero, or stop; the counts (layers, experts) int64, to which steps add, or None: no experts.

        While it counts, decode steps run layer by layer: a captured graph adds nothing.
        """
        moe = self.model_config.moe
        if moe is None:
            return None
        shape = (self.num_layers, moe.router.num_experts)
        counts = torch.zeros(shape, dtype=torch.int64, device=self.device) if counting else None
        self.model.count_experts(counts)
        self.counts_experts = counting
        return counts

    def name_parts(self, named: Named | None) -> None:
        """From now on, attention, ffn and norm of each layer that is launched run within `named` of that; None: no
        more."""
        if self._ranges is not None:
            self._ranges.close()
        self._ranges = None if named is None else LayerRanges(self.model, named)

    def refresh_derived_state(self) -> None:
        """Recompute what is a function of the parameters; to be called after every change of them."""
        self.model.refresh_derived_state()
