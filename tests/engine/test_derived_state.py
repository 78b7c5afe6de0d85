"""What is made from the parameters follows every commit, and a commit whose derived state is wrong is undone."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from versions import version_weights

from rollout import Engine
from weight_sync.errors import WeightUpdateError

GLM = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


@pytest.fixture
def engine(tiny_checkpoint):
    folder = tiny_checkpoint("glm4_moe", **GLM)
    options = {"dtype": "bfloat16", "keep_previous_weights": True, "kv_cache_bytes": 1 << 20}
    with Engine(folder, skip_tokenizer_init=True, **options) as engine:
        yield engine


def router_of(engine):
    return engine._executor._core.runner.model.layers[1].feed_forward.router


def test_a_router_that_computes_in_float32_has_its_weight_so_after_each_commit(
    engine, tiny_checkpoint
):
    router = router_of(engine)
    assert router.weight.dtype == torch.bfloat16 and router.bias.dtype == torch.float32
    assert torch.equal(router._wide, router.weight.float())
    address = router._wide.data_ptr()
    moved = version_weights(tiny_checkpoint("glm4_moe", **GLM), 1)
    engine.update_weights_from_tensor(moved)
    assert torch.equal(router._wide, moved["model.layers.1.mlp.gate.weight"].bfloat16().float())
    assert torch.equal(router.bias, moved["model.layers.1.mlp.gate.e_score_correction_bias"])
    assert router._wide.data_ptr() == address


def test_a_commit_whose_derived_state_does_not_fit_is_rolled_back(
    engine, tiny_checkpoint, monkeypatch
):
    router, before = router_of(engine), engine.weights_fingerprint()
    model, spoiled = engine._executor._core.runner.model, []
    [row] = model.derived_state

    def spoil_once():
        row.refresh()
        if not spoiled:
            spoiled.append(True)
            router._wide[0, 0] += 1

    rows = (dataclasses.replace(row, refresh=spoil_once),)
    monkeypatch.setitem(model.__dict__, "derived_state", rows)
    with pytest.raises(WeightUpdateError, match=r"mlp\.gate in float32.*\n?.*restored"):
        engine.update_weights_from_tensor(version_weights(tiny_checkpoint("glm4_moe", **GLM), 1))
    assert engine.weights_fingerprint() == before
    assert torch.equal(router._wide, router.weight.float())
