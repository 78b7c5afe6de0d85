"""In bfloat16 the engine is as far from transformers in float32 as transformers in bfloat16 is, not farther."""

from __future__ import annotations

from typing import Any

import pytest
from bfloat16_errors import errors_of

SLIDES = {
    "use_sliding_window": True,
    "sliding_window": 40,
    "layer_types": ["sliding_attention", "full_attention"],
}
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3-slides": ("qwen3", {"head_dim": 32, **SLIDES}),
    "mistral-slides": ("mistral", {"sliding_window": 40}),
}
MIDDLE = {
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "max_position_embeddings": 2048,
    "initializer_range": 0.05,
}
MIDDLING: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-512": ("llama", {**MIDDLE, "num_key_value_heads": 2}),
    "qwen3-512": ("qwen3", {**MIDDLE, "num_key_value_heads": 4, "head_dim": 128}),
    "qwen3-512-slides": (
        "qwen3",
        {
            **MIDDLE,
            "num_key_value_heads": 1,
            "head_dim": 64,
            **SLIDES,
            "layer_types": ["sliding_attention", "full_attention"] * 4,
        },
    ),
}


def check(name: str, folder: Any, device: str, longest: int, **options: Any) -> None:
    errors = errors_of(folder, device, longest=longest, **options)
    print(
        f"\nbfloat16 {name} {options.get('attention_backend', '')}: root mean square error over {errors.num_tokens} "
        f"log-probabilities: engine {errors.engine:.5f}, transformers {errors.transformers:.5f}"
    )
    # Two ways of rounding differ by chance; a mistake is larger by orders of magnitude.
    assert errors.engine <= 1.5 * errors.transformers + 1e-3, errors


@pytest.mark.parametrize("name", TINY)
def test_on_a_cpu(name, tiny_checkpoint):
    family, options = TINY[name]
    check(name, tiny_checkpoint(family, **options), "cpu", 100)


@pytest.mark.gpu
@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("name", TINY)
def test_on_a_gpu(name, block_size, tiny_checkpoint):
    family, options = TINY[name]
    check(name, tiny_checkpoint(family, **options), "cuda", 150, block_size=block_size)


@pytest.mark.gpu
@pytest.mark.parametrize("name", MIDDLING)
def test_on_a_gpu_at_middling_size(name, tiny_checkpoint):
    family, options = MIDDLING[name]
    check(name, tiny_checkpoint(family, **options), "cuda", 600, block_size=64)


@pytest.mark.gpu
def test_on_a_gpu_without_graphs_and_with_torch_operations(tiny_checkpoint):
    family, options = TINY["qwen3-slides"]
    folder = tiny_checkpoint(family, **options)
    check("qwen3-slides", folder, "cuda", 150, block_size=16, disable_cuda_graph=True)
    check("qwen3-slides", folder, "cuda", 150, block_size=16, attention_backend="torch")
