"""Routing replay: a trainer's forward that sends each token to the experts that the engine sent it to."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from rollout import Engine
from rollout.errors import ConfigError, InvalidRequestError
from trainers_integration.demo.config import ModelConfig
from trainers_integration.demo.model import build_model, save_checkpoint
from trainers_integration.demo.tokenizer import build_tokenizer
from trainers_integration.grpo.batch import make_batch
from trainers_integration.grpo.config import GrpoConfig
from trainers_integration.grpo.learner import Learner
from trainers_integration.grpo.rollouts import sample
from trainers_integration.replay import padded_routes, replayed_experts, routers_of

MOE = ModelConfig(kind="moe", hidden_size=32, num_layers=2, num_experts=64, experts_per_token=2)
PROMPTS = [[3, 4, 5, 6, 2], [7, 8, 2], [9, 1, 3, 4, 8, 7, 2]]
FAMILIES = {
    "qwen2_moe": {"num_experts": 8, "moe_intermediate_size": 16, "num_experts_per_tok": 2},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "glm4_moe": {
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
        "n_group": 2,
        "topk_group": 1,
        "routed_scaling_factor": 2.5,
    },
}


def tiny(family, **options):
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **shape, **heads, **FAMILIES[family], **options)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_replaying_ones_own_routes_changes_nothing_and_others_do(family):
    model = tiny(family)
    inputs = torch.randint(64, (2, 7), generator=torch.Generator().manual_seed(1))
    routers, seen = routers_of(model), {}
    hooks = [
        router.register_forward_hook(lambda _m, _i, output, n=n: seen.update({n: output[2]}))
        for n, router in routers.items()
    ]
    plain = model(inputs).logits
    for hook in hooks:
        hook.remove()
    routes = torch.full((2, 7, 2, 2), -1)
    for layer, ids in seen.items():
        routes[:, :, layer] = ids.view(2, 7, 2)
    with replayed_experts(model, routes.flip(-1)):
        torch.testing.assert_close(model(inputs).logits, plain)
    for partly in (routes, routes.clone()):
        partly[0, 3:] = -1
        with replayed_experts(model, partly):
            torch.testing.assert_close(model(inputs).logits, plain)
    others = routes.clone()
    others[1, 4:, max(seen)] = (others[1, 4:, max(seen)] + 1) % 4
    with replayed_experts(model, others):
        changed = model(inputs).logits
    torch.testing.assert_close(changed[0], plain[0])
    torch.testing.assert_close(changed[1, :4], plain[1, :4])
    assert (changed[1, 4:] - plain[1, 4:]).abs().max() > 1e-4
    torch.testing.assert_close(model(inputs).logits, plain)


def test_a_trainer_in_float32_replays_an_engine_in_bfloat16(tmp_path):
    model = build_model(MOE, seed=0)
    for layer in model.model.layers:  # experts that differ, and scores that are close
        torch.nn.init.normal_(layer.mlp.experts.gate_up_proj, std=0.3)
        torch.nn.init.normal_(layer.mlp.experts.down_proj, std=0.3)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    save_checkpoint(tmp_path, model, build_tokenizer())
    params = {"n": 8, "max_new_tokens": 24, "temperature": 1.0, "ignore_eos": True}
    with Engine(
        tmp_path,
        dtype="bfloat16",
        seed=0,
        kv_cache_bytes=8 << 20,
        enable_return_routed_experts=True,
    ) as engine:
        groups = sample(engine, PROMPTS, params | {"sampling_seed": 1}, routes=True)
    batch = make_batch([c for group in groups for c in group], torch.linspace(-1, 1, 24))
    gaps = {}
    for replayed in (False, True):
        routes = batch.routes if replayed else None
        learner = Learner(build_model(MOE, seed=0), GrpoConfig(learning_rate=1e-9))
        learner.model.load_state_dict(model.state_dict())
        stats = learner.learn(dataclasses.replace(batch, routes=routes))
        gaps[replayed] = (stats.logprob_gap_mean, stats.logprob_gap_max)
    (mean, largest), (own_mean, own_largest) = gaps[True], gaps[False]
    assert mean < own_mean and 5 * largest < own_largest, gaps
    grad = routers_of(learner.model)[1].weight.grad
    assert grad is not None and grad.abs().max() > 0


def test_routes_are_refused_where_they_cannot_be_replayed():
    model = tiny("mixtral")
    routes = torch.zeros((1, 3, 2, 2), dtype=torch.int16)
    with pytest.raises(InvalidRequestError, match=r"got the shape \(1, 3, 3, 2\)"):
        replayed_experts(model, torch.zeros(1, 3, 3, 2)).__enter__()
    with pytest.raises(InvalidRequestError, match="got the expert 4, expected less than 4"):
        replayed_experts(model, routes + 4).__enter__()
    with (
        replayed_experts(model, routes),
        pytest.raises(InvalidRequestError, match="got 3 tokens, expected the 4"),
    ):
        model(torch.tensor([[1, 2, 3, 4]]))
    with pytest.raises(ConfigError, match="got a qwen3, expected a mixture"):
        routers_of(build_model(ModelConfig(hidden_size=32, num_layers=2), seed=0))
    model.train().model.layers[0].gradient_checkpointing = True
    with pytest.raises(ConfigError, match="gradient checkpointing"):
        replayed_experts(model, routes).__enter__()


def test_shorter_completions_are_padded_with_tokens_that_the_model_routes():
    import numpy as np

    routes = [np.ones((3, 2, 2), np.int32), np.full((1, 2, 2), 5, np.int32)]
    padded = padded_routes(routes, 3)
    assert padded.shape == (2, 3, 2, 2) and padded.dtype == torch.int16
    assert padded[1, :, 0, 0].tolist() == [5, -1, -1]
