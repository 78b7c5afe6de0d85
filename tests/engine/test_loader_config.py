"""What a `config.json` may say, and that everything else is refused by name."""

from __future__ import annotations

import json

import pytest

from rollout.errors import CheckpointError
from rollout.models.model_config import ModelConfig

BASE = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
}


@pytest.fixture
def read(tmp_path):
    """Write a `config.json` with these changes to the base, and read it."""

    def read(**changes):
        (tmp_path / "config.json").write_text(json.dumps({**BASE, **changes}))
        return ModelConfig.from_folder(tmp_path)

    return read


def test_old_and_new_rope_keys_mean_the_same(read):
    scaling = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    new = read(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **scaling})
    old = read(rope_theta=5e5, rope_scaling={"rope_type": "llama3", **scaling})
    older = read(rope_theta=5e5, rope_scaling={"type": "llama3", **scaling})
    assert new.rope == old.rope == older.rope
    assert (new.rope.kind, new.rope.theta, new.rope.original_max_position) == ("llama3", 5e5, 8192)


def test_rope_without_any_key_is_the_default(read):
    assert (read().rope.kind, read().rope.theta) == ("default", 10_000.0)


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        ({"model_type": "mistral", "sliding_window": 8}, (8, 8, 8)),
        ({"model_type": "mistral", "sliding_window": None}, (None, None, None)),
        ({"model_type": "llama", "sliding_window": 8}, (None, None, None)),
        ({"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": False}, (None,) * 3),
        (
            {
                "model_type": "qwen2",
                "sliding_window": 8,
                "use_sliding_window": True,
                "max_window_layers": 2,
            },
            (None, None, 8),
        ),
        (
            {
                "model_type": "qwen3",
                "sliding_window": 8,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
            (8, None, 8),
        ),
    ],
)
def test_sliding_windows_per_layer(read, changes, windows):
    assert read(**changes).sliding_windows == windows


def test_the_dtype_is_read_under_its_old_and_new_key(read):
    assert read(torch_dtype="bfloat16").dtype == "bfloat16"
    assert read(dtype="float16").dtype == "float16"
    assert read().dtype is None


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2', expected one of llama, mistral, qwen2, qwen3"),
        ({"model_type": "qwen3_next"}, "qwen3_next"),
        ({"model_type": None}, "model_type None"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope type 'yarn'"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, "rope type 'dynamic'"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"num_key_value_heads": 3}, "4 query heads over 3 KV heads"),
        ({"hidden_size": "wide"}, "hidden_size"),
        (
            {"model_type": "mistral", "layer_types": ["full_attention"] * 3, "sliding_window": 4},
            "layer_types",
        ),
        (
            {"model_type": "qwen3", "layer_types": ["chunked_attention"] * 3},
            "chunked_attention",
        ),
    ],
)
def test_what_is_not_supported_is_named(read, changes, named):
    with pytest.raises(CheckpointError) as caught:
        read(**changes)
    assert named in str(caught.value)


def test_all_unsupported_features_are_in_one_error(read):
    with pytest.raises(CheckpointError) as caught:
        read(hidden_act="gelu", rope_scaling={"rope_type": "yarn", "factor": 2.0})
    assert "gelu" in str(caught.value)
    assert "yarn" in str(caught.value)
    assert "Supported" in str(caught.value)


@pytest.mark.parametrize("text", ["", "[1]", "{"])
def test_an_unreadable_configuration_names_the_file(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        ModelConfig.from_folder(tmp_path)


def test_a_folder_that_is_not_there_names_the_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json"):
        ModelConfig.from_folder(tmp_path / "nowhere")
