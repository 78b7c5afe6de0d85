"""Loaders fill every parameter in place, or refuse with one error that lists everything."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from rollout import Engine
from rollout.errors import CheckpointError, ConfigError
from rollout.models.build import build_model
from rollout.models.loader import LoadConfig, ShardedStateLoader, get_model_loader
from rollout.models.model_config import ModelConfig
from weight_sync import fingerprint

FAMILIES = [
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen3", {"head_dim": 32}),
    ("mistral", {}),
]


def empty_model(folder, dtype=torch.float32):
    return build_model(ModelConfig.from_folder(folder), dtype, "cpu")


def load(folder, dtype=torch.float32, **options):
    model = empty_model(folder, dtype)
    get_model_loader(LoadConfig(**options)).load_model(model, folder)
    return model


def state(model):
    return {name: parameter.clone() for name, parameter in model.named_parameters()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def edited_copy(folder, tmp_path, edit):
    """A checkpoint whose tensors went through `edit(dict)`."""
    copy = shutil.copytree(folder, tmp_path / "edited")
    tensors = load_file(copy / "model.safetensors")
    edit(tensors)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
@pytest.mark.parametrize(("family", "overrides"), FAMILIES)
def test_loading_twice_is_loading_once(family, overrides, load_format, tiny_checkpoint):
    folder = tiny_checkpoint(family, **overrides)
    cold = state(load(folder, load_format=load_format))
    model = load(folder, load_format=load_format)
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    for buffer in model.arena.buffers.values():
        buffer.random_(0, 256)
    get_model_loader(LoadConfig(load_format=load_format)).load_model(model, folder)
    assert equal(state(model), cold)
    assert [parameter.data_ptr() for parameter in model.parameters()] == addresses


@pytest.mark.parametrize(("family", "overrides"), FAMILIES)
def test_a_sharded_checkpoint_gives_the_same_model(family, overrides, tiny_checkpoint):
    single = tiny_checkpoint(family, **overrides)
    sharded = tiny_checkpoint(family, max_shard_size="50KB", **overrides)
    assert len(list(sharded.glob("model-*.safetensors"))) > 2
    assert equal(state(load(sharded)), state(load(single)))


def test_the_number_of_threads_does_not_matter(tiny_checkpoint):
    folder = tiny_checkpoint("qwen3")
    for load_format in ("auto", "dummy"):
        one = load(folder, load_format=load_format, num_threads=1)
        many = load(folder, load_format=load_format, num_threads=9)
        assert equal(state(one), state(many))


def test_tensors_are_cast_to_the_models_dtype(tiny_checkpoint):
    folder = tiny_checkpoint("llama")
    wide, narrow = state(load(folder)), state(load(folder, torch.bfloat16))
    assert equal({name: tensor.bfloat16() for name, tensor in wide.items()}, narrow)


def test_dummy_weights_depend_on_the_seed_and_the_name(tiny_checkpoint):
    folder = tiny_checkpoint("llama")
    first, again = load(folder, load_format="dummy"), load(folder, load_format="dummy")
    other = load(folder, load_format="dummy", seed=1)
    read = first.weight_map.read
    assert equal(state(first), state(again))
    assert not torch.equal(read("lm_head.weight"), other.weight_map.read("lm_head.weight"))
    names = [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)]
    assert not torch.equal(read(names[0]), read(names[1]))
    assert torch.equal(read("model.norm.weight"), torch.ones(64))
    assert 0.015 < read("lm_head.weight").std() < 0.025


def test_every_problem_of_a_checkpoint_is_in_one_error_and_nothing_is_written(
    tiny_checkpoint, tmp_path
):
    def edit(tensors):
        del tensors["model.norm.weight"]
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(3, 64)
        tensors["model.layers.7.mlp.up_proj.weight"] = torch.zeros(96, 64)

    folder = tiny_checkpoint("llama")
    model = load(folder)
    before = state(model)
    with pytest.raises(CheckpointError) as caught:
        get_model_loader(LoadConfig()).load_model(model, edited_copy(folder, tmp_path, edit))
    message = str(caught.value)
    assert "model.norm.weight: missing, expected shape [64]" in message
    assert "model.layers.0.mlp.up_proj.weight: got shape [3, 64], expected [96, 64]" in message
    assert "model.layers.7.mlp.up_proj.weight: unknown" in message
    assert equal(state(model), before)


def test_rotary_frequencies_in_old_checkpoints_are_ignored(tiny_checkpoint, tmp_path):
    name = "model.layers.1.self_attn.rotary_emb.inv_freq"
    folder = tiny_checkpoint("llama")
    old = edited_copy(folder, tmp_path, lambda tensors: tensors.update({name: torch.ones(8)}))
    assert equal(state(load(old)), state(load(folder)))


def test_the_buffers_of_a_model_may_be_sent_with_its_parameters(tiny_checkpoint, reference_model):
    model = reference_model(tiny_checkpoint("llama"))
    buffers = dict(model.named_buffers())
    assert buffers
    with Engine(tiny_checkpoint("llama"), kv_cache_bytes=1 << 20) as engine:
        report = engine.publish({**dict(model.named_parameters()), **buffers})
        assert report.complete and engine.weights_fingerprint() == fingerprint(model)


def test_a_tied_head_may_be_in_the_file_if_it_is_the_embedding(tiny_checkpoint, tmp_path):
    folder = tiny_checkpoint("llama", tie_word_embeddings=True)
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"

    def both(tensors):
        tensors[head] = tensors[embedding].clone()

    def only_the_head(tensors):
        tensors[head] = tensors.pop(embedding)

    def different(tensors):
        tensors[head] = tensors[embedding] + 1

    for i, edit in enumerate((both, only_the_head)):
        copy = edited_copy(folder, tmp_path / str(i), edit)
        assert equal(state(load(copy)), state(load(folder)))
    with pytest.raises(CheckpointError, match=r"lm_head.weight: differs from model.embed_tokens"):
        load(edited_copy(folder, tmp_path / "different", different))


def test_fused_projections_stand_for_their_parts(tiny_checkpoint, tmp_path):
    def fuse(tensors):
        for kind in ("weight", "bias"):
            parts = [f"model.layers.0.self_attn.{p}_proj.{kind}" for p in "qkv"]
            fused = torch.cat([tensors.pop(part) for part in parts])
            tensors[f"model.layers.0.self_attn.qkv_proj.{kind}"] = fused
        parts = [f"model.layers.1.mlp.{p}_proj.weight" for p in ("gate", "up")]
        fused = torch.cat([tensors.pop(part) for part in parts])
        tensors["model.layers.1.mlp.gate_up_proj.weight"] = fused

    folder = tiny_checkpoint("qwen2")
    assert equal(state(load(edited_copy(folder, tmp_path, fuse))), state(load(folder)))


def test_a_shard_that_is_not_there_or_cut_short_is_named(tiny_checkpoint, tmp_path):
    folder = shutil.copytree(
        tiny_checkpoint("llama", max_shard_size="50KB"), tmp_path / "checkpoint"
    )
    shards = sorted(folder.glob("model-*.safetensors"))
    shards[0].unlink()
    shards[1].write_bytes(shards[1].read_bytes()[:-9])
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    assert shards[0].name in str(caught.value)
    assert shards[1].name in str(caught.value)


def test_an_index_cannot_lead_out_of_the_folder(tiny_checkpoint, tmp_path):
    outside = tiny_checkpoint("llama") / "model.safetensors"
    folder = shutil.copytree(tiny_checkpoint("llama"), tmp_path / "checkpoint")
    (folder / "model.safetensors").unlink()
    names = dict.fromkeys(load_file(outside), str(outside))
    index = json.dumps({"weight_map": names})
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load(folder)


@pytest.mark.parametrize("index", ["{", "[]", '{"weight_map": 3}'])
def test_an_unreadable_index_is_a_checkpoint_error(index, tiny_checkpoint, tmp_path):
    folder = shutil.copytree(tiny_checkpoint("llama"), tmp_path / "checkpoint")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=r"index\.json.*expected a JSON object"):
        load(folder)


def test_a_folder_without_weights_says_so(tiny_checkpoint, tmp_path):
    shutil.copy(tiny_checkpoint("llama") / "config.json", tmp_path)
    with pytest.raises(CheckpointError, match=r"no weights.*safetensors.*dummy"):
        load(tmp_path)


def test_an_unknown_load_format_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"got 'pickle', expected one of auto, safetensors"):
        get_model_loader(LoadConfig(load_format="pickle"))


@pytest.mark.parametrize(("family", "overrides"), FAMILIES)
def test_a_ranks_own_state_survives_a_round_trip(family, overrides, tiny_checkpoint, tmp_path):
    folder = tiny_checkpoint(family, **overrides)
    model = load(folder)
    ShardedStateLoader.save_model(model, tmp_path)
    other = empty_model(folder)
    get_model_loader(LoadConfig(load_format="sharded_state")).load_model(other, tmp_path)
    assert equal(state(other), state(model))


def test_the_state_of_another_model_is_refused_whole(tiny_checkpoint, tmp_path):
    ShardedStateLoader.save_model(load(tiny_checkpoint("llama")), tmp_path)
    other = load(tiny_checkpoint("qwen2", hidden_size=32), torch.bfloat16)
    before = state(other)
    with pytest.raises(CheckpointError) as caught:
        ShardedStateLoader().load_model(other, tmp_path)
    assert "layers.0.attention.qkv.bias: missing" in str(caught.value)
    assert "norm.weight: got torch.float32 [64], expected torch.bfloat16 [32]" in str(caught.value)
    assert equal(state(other), before)


def test_a_missing_state_names_the_file_of_the_rank(tiny_checkpoint, tmp_path):
    with pytest.raises(CheckpointError, match=r"model-rank-0-part-0\.safetensors"):
        ShardedStateLoader().load_model(empty_model(tiny_checkpoint("llama")), tmp_path)
