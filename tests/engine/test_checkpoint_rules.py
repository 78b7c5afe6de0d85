"""What a folder means is what transformers makes of it: which files, which dtype, which rotary angles."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rollout import Engine
from rollout.engine.loop.checks import check_dtype
from rollout.errors import CheckpointError
from rollout.models.checkpoint_files import CheckpointFiles
from rollout.models.model_config import ModelConfig
from rollout.tokenizer import Tokenizer
from weight_sync.errors import ManifestMismatch

SCALED = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 = {"rope_type": "llama3", **SCALED}
ROPES = {
    "original length beside": {"rope_scaling": LLAMA3, "original_max_position_embeddings": 64},
    "original length inside": {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 64}},
    "two original lengths": {
        "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 128},
        "original_max_position_embeddings": 64,
    },
    "parameters, length beside": {
        "rope_parameters": {**LLAMA3, "rope_theta": 5e5},
        "original_max_position_embeddings": 64,
    },
    "no original length": {"rope_scaling": LLAMA3},
    "linear in the old spelling": {
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "rope_theta": 5e3,
    },
    "linear, theta beside": {
        "rope_parameters": {"rope_type": "linear", "factor": 2.0},
        "rope_theta": 7e3,
    },
    "nothing said": {},
    "no scaling": {"rope_scaling": None, "rope_theta": 7e3},
}


@pytest.fixture
def copy(tiny_checkpoint, tmp_path):
    """`copy(family, **config)`: a folder to change, with `config.json` as given, not as transformers rewrites it."""

    def make(family, **overrides):
        folder = shutil.copytree(tiny_checkpoint(family), tmp_path / family)
        config = json.loads((folder / "config.json").read_text())
        for key in ("rope_parameters", "rope_scaling", "rope_theta"):
            config.pop(key, None)
        (folder / "config.json").write_text(json.dumps({**config, **overrides}))
        return folder

    return make


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
def test_rotary_angles_are_those_of_transformers_in_every_spelling(copy, family, rope):
    folder = copy(family, **rope)
    model = AutoModelForCausalLM.from_pretrained(folder)
    config = ModelConfig.from_folder(folder)
    ours = config.rope.inverse_frequencies(config.head_dim)
    assert torch.equal(ours, model.model.rotary_emb.inv_freq.float())


@pytest.mark.parametrize("kind", ["yarn", "dynamic", "longrope"])
def test_a_kind_of_rope_that_is_not_served_is_refused(copy, kind):
    folder = copy("qwen3", rope_scaling={"rope_type": kind, "factor": 2.0})
    with pytest.raises(CheckpointError, match=kind):
        ModelConfig.from_folder(folder)


def test_log_probabilities_agree_with_the_original_length_beside(copy):
    folder = copy("llama", rope_scaling=LLAMA3, original_max_position_embeddings=64)
    ids = list(range(3, 150))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    expected = expected.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    with Engine(folder, kv_cache_bytes=1 << 20) as engine:
        (got,) = engine.sequence_logprobs([ids])
    assert torch.tensor(got[-len(expected) :]).sub(expected).abs().max() < 1e-4


# ---- which files -----------------------------------------------------------------------------------------------------


def noise(folder, name, scale=3.0):
    """Weights of another model of the same shapes, as `name`."""
    tensors = load_file(folder / "model.safetensors")
    save_file({key: value * scale for key, value in tensors.items()}, folder / name)


def assert_same_as_transformers(folder):
    expected = AutoModelForCausalLM.from_pretrained(folder).model.embed_tokens.weight
    assert torch.equal(CheckpointFiles(folder).read("model.embed_tokens.weight"), expected.data)


def test_a_single_file_wins_over_an_older_index(copy):
    folder = copy("qwen3")
    noise(folder, "model-00001-of-00001.safetensors")
    names = dict.fromkeys(
        load_file(folder / "model.safetensors"), "model-00001-of-00001.safetensors"
    )
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert_same_as_transformers(folder)


def test_an_index_with_a_name_in_the_wrong_file_is_read_as_transformers_reads_it(
    tiny_checkpoint, tmp_path
):
    folder = shutil.copytree(tiny_checkpoint("qwen3", max_shard_size="50KB"), tmp_path / "model")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    files = list(index["weight_map"].values())
    name = next(n for n, file in index["weight_map"].items() if files.count(file) > 1)
    index["weight_map"][name] = next(file for file in files if file != index["weight_map"][name])
    path.write_text(json.dumps(index))
    expected = AutoModelForCausalLM.from_pretrained(folder).state_dict()[name]
    assert torch.equal(CheckpointFiles(folder).read(name), expected)


def test_other_files_in_the_folder_are_no_part_of_the_model(copy):
    folder = copy("qwen3")
    for name in ("model_old.safetensors", "adapter_model.safetensors", "optimizer.safetensors"):
        noise(folder, name)
    assert_same_as_transformers(folder)
    with Engine(folder, kv_cache_bytes=1 << 20) as engine:
        before = engine.weights_fingerprint()
        engine.update_weights_from_disk(folder)
        assert engine.weights_fingerprint() == before


def test_a_folder_with_only_other_files_is_refused_at_the_start_and_by_an_update(
    copy, tiny_checkpoint
):
    folder = copy("qwen3")
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        CheckpointFiles(folder)
    with Engine(tiny_checkpoint("qwen3"), kv_cache_bytes=1 << 20) as engine:
        with pytest.raises(Exception, match=r"model\.safetensors"):
            engine.update_weights_from_disk(folder)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rms_norm_eps", 1e-2),
        ("rope_theta", 77.0),
        ("num_attention_heads", 2),
        ("model_type", "llama"),
    ],
)
def test_an_update_from_disk_refuses_another_model_with_the_same_shapes(
    copy, tiny_checkpoint, name, value
):
    folder = copy("qwen3", **{name: value})
    with Engine(tiny_checkpoint("qwen3"), kv_cache_bytes=1 << 20) as engine:
        before = engine.weights_fingerprint()
        with pytest.raises(ManifestMismatch, match="describes another model"):
            engine.update_weights_from_disk(folder)
        assert engine.weights_fingerprint() == before
        assert engine.model_path == str(tiny_checkpoint("qwen3"))


# ---- dtype -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({}, "bfloat16"),
        ({"dtype": None}, "bfloat16"),
        ({"torch_dtype": "torch.float16"}, "float16"),
        ({"torch_dtype": "float16"}, "float16"),
        ({"dtype": "torch.float32"}, "float32"),
        ({"dtype": "float32"}, "float32"),
    ],
)
def test_the_dtype_is_the_configurations_else_that_of_the_files(copy, said, expected):
    folder = copy("qwen3")
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {name: tensor.bfloat16() for name, tensor in tensors.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    config = json.loads((folder / "config.json").read_text())
    config.pop("dtype", None)
    (folder / "config.json").write_text(json.dumps({**config, **said}))
    from rollout.config import EngineConfig

    assert (
        check_dtype(EngineConfig(model_path=str(folder)), ModelConfig.from_folder(folder))
        == expected
    )
    assert Tokenizer(folder).encode("then") == [260, 77]  # It reads the configuration too.


def test_a_tokenizer_that_cannot_be_read_is_refused_in_words(copy):
    folder = copy("qwen3")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="cannot load a tokenizer"):
        Tokenizer(folder)


ODD = (None, "x", -1, 0, 1.5, [], ["a"], [1], {}, {"a": 1}, True, float("nan"), 1e30, 10**12)


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe", "glm4_moe"])
def test_whatever_a_configuration_says_is_read_or_refused_with_its_type(
    tiny_checkpoint, tmp_path, family
):
    raw = json.loads((tiny_checkpoint(family) / "config.json").read_text())
    places = [(raw, key) for key in raw] + [
        (inner, key) for inner in raw.values() if isinstance(inner, dict) for key in inner
    ]
    refused = set()
    for values, key in places:
        for odd in ODD:
            usual, values[key] = values[key], odd
            (tmp_path / "config.json").write_text(json.dumps(raw))
            values[key] = usual
            try:
                ModelConfig.from_folder(tmp_path)
            except CheckpointError:
                refused.add((key, repr(odd)))
    counts = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")
    bad = [repr(odd) for odd in ODD if odd is not None]
    assert refused >= {(key, odd) for key in counts for odd in bad}
    if family == "glm4_moe":  # layers further ahead become names
        assert refused >= {("num_nextn_predict_layers", odd) for odd in bad if odd != "0"}
    assert refused >= {("rms_norm_eps", "0"), ("rms_norm_eps", "nan"), ("rope_theta", "-1")}


def test_a_number_that_is_none_is_named_with_what_is_expected(copy):
    folder = copy("qwen3", num_hidden_layers=10**12)
    with pytest.raises(
        CheckpointError,
        match=r"num_hidden_layers of config.json: got 1000000000000, .* 1 to 10,000",
    ):
        ModelConfig.from_folder(folder)
