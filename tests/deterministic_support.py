"""Tiny models for tests of `deterministic=True`, in triton's interpreter or on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from rollout import Engine

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "tie_word_embeddings": True},
    "qwen3": {
        "head_dim": 16,
        "use_sliding_window": True,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}
PROMPT = [5, 9, 2, 7, 1, 3, 8, 4, 6, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20]
STRANGERS = [[1, 2, 3], [4] * 40, PROMPT[:9]]


def make_model(family: str, dtype: torch.dtype, **options: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        family,
        **{
            "vocab_size": 256,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "initializer_range": 0.2,
            **FAMILIES.get(family, {}),
            **options,
        },
    )
    torch.manual_seed(3)
    return AutoModelForCausalLM.from_config(config).to(dtype)


@contextmanager
def folder_of(model: Any) -> Iterator[Path]:
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        yield Path(folder)


def sample(
    folder: Path, prompts: list[list[int]], device: torch.device, **options: Any
) -> tuple[list[int], list[float]]:
    """Tokens and log-probabilities of the first prompt."""
    defaults = {
        "attention_backend": "triton",
        "deterministic": True,
        "kv_cache_bytes": 1 << 20,
        "max_running_requests": 8,
        "skip_tokenizer_init": True,
    }
    with Engine(folder, device=str(device), **{**defaults, **options}) as engine:
        params = [
            {"max_new_tokens": 4, "temperature": 0.8, "sampling_seed": 11 + i, "ignore_eos": True}
            for i in range(len(prompts))
        ]
        if options.get("enable_prefix_cache", True):
            engine.generate(input_ids=[PROMPT[:17]], sampling_params={"max_new_tokens": 1})
        result = engine.generate(input_ids=prompts, sampling_params=params, return_logprob=True)[0]
    logprobs = [value for value, _, _ in result["meta_info"]["output_token_logprobs"]]
    return result["output_ids"], logprobs


def check_any_batch_chunk_or_prefix(model: Any, device: torch.device) -> None:
    """The first prompt's tokens and log-probabilities have the same bits however it is computed."""
    with folder_of(model) as folder:
        alone = sample(folder, [PROMPT], device, enable_prefix_cache=False)
        for prompts, options in (
            ([PROMPT, *STRANGERS], {}),
            ([PROMPT], {"chunked_prefill_size": 8, "enable_prefix_cache": False}),
            ([PROMPT, STRANGERS[0]], {"disable_cuda_graph": True, "overlap": True}),
        ):
            assert sample(folder, prompts, device, **options) == alone, options
