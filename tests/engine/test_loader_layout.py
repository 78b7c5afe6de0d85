"""Where parameters lie: one buffer, in manifest order, never rebound."""

from __future__ import annotations

import pytest
import torch

from rollout.models.build import build_model
from rollout.models.model_config import ModelConfig
from weight_sync.layout.manifest import Manifest

#: All parts of fused parameters are multiples of 256 bytes, as in any model of real size.
EVEN = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "head_dim": 64}


def build(folder, dtype=torch.bfloat16):
    return build_model(ModelConfig.from_folder(folder), dtype, "cpu")


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("qwen3", {"tie_word_embeddings": True}),
    ],
)
def test_the_arena_has_the_bytes_of_the_canonical_manifest(family, overrides, tiny_checkpoint):
    model = build(tiny_checkpoint(family, **EVEN, **overrides))
    manifest = Manifest(tensors=model.weight_map.metas(), bucket_bytes=1 << 20)
    [arena] = model.arena.buffers.values()
    assert arena.nbytes == manifest.arena_bytes
    starts = {
        part.name: part.destination.data_ptr() - arena.data_ptr()
        for part in model.weight_map.placements
    }
    assert [starts[meta.name] for meta in manifest.tensors] == list(manifest.offsets)


def test_parts_of_a_fused_projection_are_neighbours_even_when_they_are_not_aligned(
    tiny_checkpoint,
):
    model = build(tiny_checkpoint("qwen2", hidden_size=40, intermediate_size=50))
    where = {part.name: part.destination for part in model.weight_map.placements}
    prefix = "model.layers.0.self_attn"
    query, key = where[f"{prefix}.q_proj.bias"], where[f"{prefix}.k_proj.bias"]
    assert query.data_ptr() + query.nbytes == key.data_ptr()
    assert all(parameter.data_ptr() % 256 == 0 for parameter in model.parameters())


def test_a_tied_head_is_the_embedding_itself(tiny_checkpoint):
    model = build(tiny_checkpoint("llama", tie_word_embeddings=True))
    assert model.head.weight is model.embedding.weight
    assert "lm_head.weight" not in {meta.name for meta in model.weight_map.metas()}
    assert model.weight_map.aliases == {"lm_head.weight": "model.embed_tokens.weight"}


def test_the_canonical_names_are_those_of_the_checkpoint(tiny_checkpoint, reference_model):
    for family in ("llama", "qwen2", "qwen3", "mistral"):
        folder = tiny_checkpoint(family)
        expected = {
            name: tuple(parameter.shape)
            for name, parameter in reference_model(folder).named_parameters()
        }
        got = {meta.name: meta.shape for meta in build(folder).weight_map.metas()}
        assert got == expected


def test_rotary_frequencies_stay_float32_in_any_dtype(tiny_checkpoint):
    assert build(tiny_checkpoint("llama")).rotary.frequencies.dtype == torch.float32
