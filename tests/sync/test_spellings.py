"""Experts in every spelling: loaded, sent, read back and counted as the same weights."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from versions import in_memory, version_weights

import weight_sync
from rollout.models.build import build_model
from rollout.models.loader import DefaultModelLoader
from rollout.models.model_config import ModelConfig
from weight_sync import WeightPublisher
from weight_sync.errors import ManifestMismatch
from weight_sync.layout.spellings import canonical_name

FAMILIES = {
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "mixtral": {"num_local_experts": 4, "intermediate_size": 40},
    "glm4_moe": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 0,
        "n_shared_experts": 1,
    },
}


@pytest.fixture(params=FAMILIES)
def folder(request, tiny_checkpoint) -> Path:
    return tiny_checkpoint(request.param, **FAMILIES[request.param])


@pytest.fixture
def engine(folder):
    from rollout import Engine

    with Engine(folder, skip_tokenizer_init=True, kv_cache_bytes=1 << 20) as engine:
        yield engine


def test_both_spellings_load_to_the_same_bytes(folder, tmp_path):
    from safetensors.torch import save_file

    stacked = tmp_path / "stacked"
    stacked.mkdir()
    tensors = version_weights(folder, 0)
    save_file(in_memory(tensors), stacked / "model.safetensors")
    config = ModelConfig.from_folder(folder)
    models = [build_model(config, torch.float32, "cpu") for _ in range(2)]
    for model, source in zip(models, (folder, stacked), strict=True):
        DefaultModelLoader().load_model(model, source)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)
    for name, tensor in (tensors | in_memory(tensors)).items():
        assert torch.equal(models[0].weight_map.read(name), tensor), name


@pytest.mark.parametrize("bucket_bytes", [700, 1 << 20])
def test_both_spellings_sync_in_any_order_to_the_same_fingerprint(engine, folder, bucket_bytes):
    tensors = version_weights(folder, 1)
    stacked = in_memory(tensors)
    values = {weight_sync.fingerprint(tensors), weight_sync.fingerprint(stacked)}
    assert len(values) == 1
    for number, held in enumerate((tensors, stacked)):
        items = list(held.items())
        random.Random(number).shuffle(items)
        with WeightPublisher(engine, bucket_bytes=bucket_bytes) as publisher:
            publisher.publish({name: tensor + 1 for name, tensor in items})
            assert publisher.publish(items).fingerprint in values
        assert engine.weights_fingerprint() in values


def test_a_module_publishes_its_experts_and_its_routers_biases(engine, folder, reference_model):
    module = reference_model(folder)
    with WeightPublisher(engine) as publisher:
        publisher.publish({name: tensor + 1 for name, tensor in version_weights(folder, 0).items()})
        report = publisher.publish(module)
    assert report.fingerprint == engine.weights_fingerprint() == weight_sync.fingerprint(module)


def test_a_module_in_bfloat16_keeps_its_routers_as_exact_as_it_holds_them(folder):
    """GLM-4-MoE's in float32: rounded, they would choose other experts than the trainer's."""
    from transformers import AutoModelForCausalLM

    from rollout import Engine

    module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    options = {"dtype": "bfloat16", "skip_tokenizer_init": True, "kv_cache_bytes": 1 << 20}
    with Engine(folder, **options) as engine, WeightPublisher(engine) as publisher:
        assert engine.weights_fingerprint() == weight_sync.fingerprint(module)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
        report = publisher.publish(module)
        assert not report.casts
        assert engine.weights_fingerprint() == weight_sync.fingerprint(module)
        (name,) = [
            n for n, _ in module.named_parameters() if n.endswith("layers.1.mlp.gate.weight")
        ]
        read = torch.tensor(engine.get_weights_by_name(name))
        assert torch.equal(read, module.get_parameter(name).float())


def test_one_expert_alone_and_a_subset_of_stacks_change_nothing_else(engine, folder):
    tensors, moved = version_weights(folder, 0), version_weights(folder, 1)
    one = [name for name in tensors if ".1." in name and ".experts.2." in name]
    assert len(one) == 3
    engine.update_weights_from_tensor({name: moved[name] for name in one})
    held = {**tensors, **{name: moved[name] for name in one}}
    assert engine.weights_fingerprint() == weight_sync.fingerprint(held)
    stack = "model.layers.0.mlp.experts.down_proj"
    engine.update_weights_from_tensor({stack: in_memory(moved)[stack]})
    whole = {**in_memory(held), stack: in_memory(moved)[stack]}
    assert engine.weights_fingerprint() == weight_sync.fingerprint(whole)
    read = torch.tensor(engine.get_weights_by_name(stack, truncate_size=10**6))
    assert torch.equal(read, in_memory(moved)[stack])


def test_stacked_experts_of_another_shape_are_refused_by_name(engine, folder):
    name = "model.layers.0.mlp.experts.gate_up_proj"
    right = in_memory(version_weights(folder, 1))[name]
    with pytest.raises(ManifestMismatch, match=name):
        engine.update_weights_from_tensor({name: right.transpose(1, 2).contiguous()})


def test_names_of_checkpoints_have_one_spelling():
    other = "model.layers.3.block_sparse_moe."
    assert canonical_name(other + "gate.weight") == "model.layers.3.mlp.gate.weight"
    expert = "model.layers.3.mlp.experts.7."
    for short, kind in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
        assert canonical_name(f"{other}experts.7.{short}.weight") == f"{expert}{kind}.weight"
    assert canonical_name("model.norm.weight") == "model.norm.weight"
