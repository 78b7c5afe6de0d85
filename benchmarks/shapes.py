"""Models that are made in place: a folder with nothing but a configuration, and the tensors of a trainer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from .settings import ModelShape, MoeShape

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@contextmanager
def model_folder(shape: ModelShape | MoeShape, dtype: str, context_length: int) -> Iterator[Path]:
    """A temporary folder that an engine reads with `load_format="dummy"`."""
    with TemporaryDirectory(prefix="rollout-bench-") as folder:
        path = Path(folder)
        (path / "config.json").write_text(json.dumps(hf_config(shape, dtype, context_length)))
        yield path


def hf_config(shape: ModelShape | MoeShape, dtype: str, context_length: int) -> dict[str, Any]:
    """The `config.json` of a Qwen3 model."""
    if isinstance(shape, MoeShape):
        family: dict[str, Any] = {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "intermediate_size": shape.expert_size,
            "moe_intermediate_size": shape.expert_size,
            "num_experts": shape.num_experts,
            "num_experts_per_tok": shape.top_k,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    else:
        family = {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "intermediate_size": shape.intermediate_size,
        }
    return {
        **family,
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "max_position_embeddings": context_length,
        "tie_word_embeddings": shape.tied,
        "attention_bias": False,
        "torch_dtype": dtype,
        "eos_token_id": shape.vocab_size - 1,
        "pad_token_id": shape.vocab_size - 1,
    }


def trainer_tensors(
    shape: ModelShape | MoeShape, dtype: torch.dtype, device: str = "cpu"
) -> dict[str, torch.Tensor]:
    """What a trainer of such a model holds: each tensor in memory of its own, in checkpoint order."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (shape.vocab_size, shape.hidden_size)
    }
    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    hidden = shape.hidden_size
    for layer in range(shape.num_layers):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.self_attn.q_proj.weight": (queries, hidden),
            f"{prefix}.self_attn.k_proj.weight": (keys, hidden),
            f"{prefix}.self_attn.v_proj.weight": (keys, hidden),
            f"{prefix}.self_attn.o_proj.weight": (hidden, queries),
            f"{prefix}.self_attn.q_norm.weight": (shape.head_dim,),
            f"{prefix}.self_attn.k_norm.weight": (shape.head_dim,),
            **_feed_forward(shape, f"{prefix}.mlp"),
            f"{prefix}.input_layernorm.weight": (hidden,),
            f"{prefix}.post_attention_layernorm.weight": (hidden,),
        }
    shapes["model.norm.weight"] = (hidden,)
    if not shape.tied:
        shapes["lm_head.weight"] = (shape.vocab_size, shape.hidden_size)
    generator = torch.Generator(device).manual_seed(0)
    tensors = {}
    for name, size in shapes.items():
        if name.endswith("norm.weight"):
            tensors[name] = torch.ones(size, dtype=dtype, device=device)
        else:
            tensor = torch.empty(size, dtype=dtype, device=device)
            tensors[name] = tensor.normal_(0, 0.02, generator=generator)
    return tensors


def _feed_forward(shape: ModelShape | MoeShape, prefix: str) -> dict[str, tuple[int, ...]]:
    """Dense, or a router and three matrices for each expert."""
    hidden = shape.hidden_size
    if isinstance(shape, ModelShape):
        inner, parts, router = shape.intermediate_size, [prefix], {}
    else:
        inner, router = shape.expert_size, {f"{prefix}.gate.weight": (shape.num_experts, hidden)}
        parts = [f"{prefix}.experts.{expert}" for expert in range(shape.num_experts)]
    matrices: dict[str, tuple[int, ...]] = {}
    for part in parts:
        matrices |= {
            f"{part}.gate_proj.weight": (inner, hidden),
            f"{part}.up_proj.weight": (inner, hidden),
            f"{part}.down_proj.weight": (hidden, inner),
        }
    return router | matrices


def move_a_little(tensors: dict[str, torch.Tensor]) -> None:
    """Stands for an optimiser step: every tensor changes, in place, at next to no cost."""
    with torch.no_grad():
        for tensor in tensors.values():
            tensor.view(-1)[:1].neg_()


def num_bytes(tensors: dict[str, torch.Tensor]) -> int:
    """Bytes of all tensors."""
    return sum(tensor.nbytes for tensor in tensors.values())
