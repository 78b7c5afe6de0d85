"""The family variants that parity is shown for, and a runner that is driven by hand, without a scheduler."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from rollout.layers.single_group import TensorParallelGroup
from rollout.models.loader_config import LoadConfig
from rollout.models.model_config import ModelConfig
from rollout.runner.attention_backend import DrawnTokens
from rollout.runner.model_runner import ModelRunner
from rollout.sampling_params import SamplingParams
from rollout.scheduling.batch import ScheduledBatch, ScheduledItem
from rollout.scheduling.request import Request

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

MOE = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 48}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied-llama3-rope": (
        "llama",
        {"tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE},
    ),
    "llama-biases-linear-rope": (
        "llama",
        {
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 5_000.0, "factor": 4.0},
        },
    ),
    "llama-one-kv-head-wide-heads": ("llama", {"num_key_value_heads": 1, "head_dim": 24}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-upper-layers-slide": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3-bias-layer-types": (
        "qwen3",
        {
            "head_dim": 16,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 12,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 32}),
    "mistral-slides": ("mistral", {"sliding_window": 7}),
    "qwen3-moe-first-layer-dense": (
        "qwen3_moe",
        {**MOE, "head_dim": 32, "mlp_only_layers": [0], "norm_topk_prob": True},
    ),
    "qwen2-moe-shared-expert": ("qwen2_moe", {**MOE, "shared_expert_intermediate_size": 80}),
    "mixtral": ("mixtral", {"num_local_experts": 6, "sliding_window": None}),
    "glm4-moe-groups-and-bias": (
        "glm4_moe",
        {
            **{key: value for key, value in MOE.items() if key != "num_experts"},
            "n_routed_experts": 8,
            "n_group": 4,
            "topk_group": 2,
            "num_experts_per_tok": 3,
            "routed_scaling_factor": 1.8,
            "use_qk_norm": True,
            "attention_bias": True,
            "first_k_dense_replace": 1,
            "n_shared_experts": 2,
        },
    ),
}


class HandDriver:
    """Runs requests through a `ModelRunner` in steps of the test's choice; blocks are scattered over the pool."""

    def __init__(
        self,
        folder: Path,
        *,
        block_size: int = 4,
        num_blocks: int = 256,
        dtype: torch.dtype = torch.float32,
        tp: TensorParallelGroup | None = None,
        ep_size: int = 1,
        attention_backend: str = "auto",
        device: str = "cpu",
    ) -> None:
        self.runner = ModelRunner(
            ModelConfig.from_folder(folder),
            dtype=dtype,
            device=device,
            block_size=block_size,
            num_blocks=num_blocks,
            tp=tp,
            ep_size=ep_size,
            attention_backend=attention_backend,
        )
        self.runner.kv_pool.memory.fill_(float("nan"))  # What was never written must never be read.
        self.runner.load_model(folder, LoadConfig())
        self.free = list(range(num_blocks))
        random.Random(0).shuffle(self.free)
        self.logits: dict[str, dict[int, torch.Tensor]] = {}

    def request(self, token_ids: Sequence[int]) -> Request:
        """A request with blocks for the tokens that it has."""
        request = Request(
            rid=f"request-{len(self.logits)}", prompt_ids=token_ids, params=SamplingParams()
        )
        self.logits[request.rid] = {}
        self.own_blocks(request)
        return request

    def own_blocks(self, request: Request) -> None:
        """Give `request` blocks for all of its tokens."""
        while len(request.block_ids) * self.runner.block_size < request.num_tokens:
            request.block_ids.append(self.free.pop())

    def step(
        self,
        chunks: Sequence[tuple[Request, int]],
        block_copies: Sequence[tuple[int, int]] = (),
        drawn: DrawnTokens | None = None,
    ) -> list[torch.Tensor]:
        """Compute the next `length` tokens of each (request, length) in one batch; the logits of each item's rows."""
        items = [
            ScheduledItem(request=request, start=request.num_computed, length=length, samples=True)
            for request, length in chunks
        ]
        batch = ScheduledBatch(
            items=items,
            block_copies=list(block_copies),
            num_tokens=sum(length for _, length in chunks),
            num_decodes=0,
        )
        logits = self.runner.compute_logits(self.runner.forward(batch, drawn))
        rows = logits.split([length for _, length in chunks])
        for (request, length), part in zip(chunks, rows, strict=True):
            for offset in range(length):
                self.logits[request.rid][request.num_computed + offset] = part[offset]
            request.num_computed += length
        return list(rows)

    def logprobs(self, request: Request) -> torch.Tensor:
        """Log-probabilities after every computed token of `request`, (tokens, vocabulary)."""
        seen = self.logits[request.rid]
        return torch.stack([seen[position] for position in sorted(seen)]).log_softmax(-1)


@pytest.fixture(params=VARIANTS)
def variant_folder(request: pytest.FixtureRequest, tiny_checkpoint: Callable[..., Path]) -> Path:
    """The checkpoint of each family variant in turn."""
    family, overrides = VARIANTS[request.param]
    return tiny_checkpoint(family, **overrides)


@pytest.fixture(scope="session")
def hand_driver() -> type[HandDriver]:
    """The class, to be given a checkpoint folder."""
    return HandDriver


@pytest.fixture(scope="session")
def reference_logprobs(
    reference_model: Callable[[Path], Any],
) -> Callable[[Path, Sequence[int]], torch.Tensor]:
    """`reference_logprobs(folder, token_ids)`: what transformers says after every token, (tokens, vocabulary)."""

    def compute(folder: Path, token_ids: Sequence[int]) -> torch.Tensor:
        with torch.no_grad():
            logits = reference_model(folder)(torch.tensor([list(token_ids)])).logits[0]
        return logits.float().log_softmax(-1)

    return compute
