"""An engine whose ranks own different experts: synced whole and one expert alone, it is the engine of one rank."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import weight_sync
from rollout import Engine
from weight_sync import WeightPublisher
from weight_sync.layout.named_tensors import named_weights

MOE = {"num_experts_per_tok": 3, "moe_intermediate_size": 48, "norm_topk_prob": False}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2_moe": {**MOE, "num_experts": 8, "shared_expert_intermediate_size": 64},
    "glm4_moe": {
        **MOE,
        "n_routed_experts": 8,
        "n_group": 4,
        "topk_group": 2,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 1.7,
        "head_dim": 16,
    },
}
PROMPTS = [[5, 9, 2], list(range(20, 61)), [17, 40, 3, 99, 5, 5]]
SAMPLED = {"max_new_tokens": 6, "ignore_eos": True, "sampling_seed": 3, "n": 2}
OPTIONS: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "enable_return_routed_experts": True,
    "block_size": 4,
    "kv_cache_bytes": 1 << 20,
    "chunked_prefill_size": 16,
    "num_threads": 1,
}


def ask(engine: Engine) -> tuple[list[dict[str, Any]], np.ndarray[Any, Any]]:
    engine.start_expert_distribution_record()
    results = engine.generate(
        input_ids=PROMPTS, sampling_params=SAMPLED, return_logprob=True, return_routed_experts=True
    )
    return results, engine.dump_expert_distribution_record()


def check_same(one: Engine, two: Engine, model: Any, atol: float) -> None:
    """Weights, tokens, routes and counts of both; log-probabilities are the model's."""
    expected = weight_sync.fingerprint(model)
    assert one.weights_fingerprint() == two.weights_fingerprint() == expected
    (single, counts), (parallel, counts_too) = ask(one), ask(two)
    np.testing.assert_array_equal(counts, counts_too)
    prompts = [prompt for prompt in PROMPTS for _ in range(SAMPLED["n"])]
    for prompt, a, b in zip(prompts, single, parallel, strict=True):
        ids = b["output_ids"]
        assert a["output_ids"] == ids
        routes = [np.sort(result["meta_info"]["routed_experts"], axis=-1) for result in (a, b)]
        np.testing.assert_array_equal(*routes)
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
        want = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).squeeze(1)
        got = torch.tensor([value for value, _, _ in b["meta_info"]["output_token_logprobs"]])
        torch.testing.assert_close(got, want, atol=atol, rtol=0)


ON_GPUS = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 GPUs"),
]
DEVICES = ["cpu", pytest.param("cuda", marks=ON_GPUS)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", FAMILIES)
def test_ranks_with_experts_of_their_own_follow_every_update(
    family: str, device: str, tiny_checkpoint: Callable[..., Path]
) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny_checkpoint(family, **FAMILIES[family])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    options = OPTIONS | {"device": device, "block_size": 4 if device == "cpu" else 16}
    atol = 1e-4 if device == "cpu" else 1e-3  # sums in another order than the model's on the CPU
    with (
        Engine(folder, **options) as one,
        Engine(folder, executor="local", tp_size=2, ep_size=2, **options) as two,
    ):
        experts = model.model.layers[1].mlp.experts
        both, down, width = experts.gate_up_proj, experts.down_proj, 48
        both[5].mul_(-0.7)
        down[5].add_(0.1)
        prefix = "model.layers.1.mlp.experts.5"
        alone = {
            f"{prefix}.gate_proj.weight": both[5, :width],
            f"{prefix}.up_proj.weight": both[5, width:],
            f"{prefix}.down_proj.weight": down[5],
        }
        for engine in (one, two):
            with WeightPublisher(engine) as publisher:
                assert publisher.publish(alone, strict=False).updated == 3
        check_same(one, two, model, atol)
        for name, held in named_weights(model):
            noise = torch.randn(held.shape, generator=generator)
            held.add_(noise, alpha=0.3 if name.endswith("bias") else 0.02)
        group: dict[str, Any] = {"transport": "process_group", "group_backend": "gloo"}
        for engine, way in ((one, {}), (two, group)):
            with WeightPublisher(engine, **way) as publisher:
                publisher.publish(model)
        check_same(one, two, model, atol)
