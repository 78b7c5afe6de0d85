"""Make a model: its structure on the meta device first, then all parameters at once as views of an arena."""

from __future__ import annotations

import torch

from weight_sync.layout.weight_map import WeightMap

from ..layers.embedding import VocabParallelEmbedding
from ..layers.single_group import SingleGroup, TensorParallelGroup
from .arena import ParameterArena
from .decoder import Decoder
from .model_config import ModelConfig


def build_model(
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device | str,
    tp: TensorParallelGroup | None = None,
) -> Decoder:
    """This rank's part of the model, all zeros, with its weight map; a loader fills it."""
    device = torch.device(device)
    with torch.device("meta"):
        model = Decoder(config, tp or SingleGroup(), device).to(dtype)
    model.arena = ParameterArena(device)
    model.arena.materialize(model, model.parameters())
    model.weight_map = _weight_map(model)
    return model.eval()


def _weight_map(model: Decoder) -> WeightMap:
    """Checkpoint names to parameters. Rows that pad the vocabulary belong to no checkpoint tensor and are left out."""
    config = model.config
    parameters = {name: parameter.data for name, parameter in model.named_parameters()}
    for name, table in (("embedding.weight", model.embedding), ("head.weight", model.head)):
        if name in parameters and isinstance(table, VocabParallelEmbedding):
            parameters[name] = table.weight.data[: table.num_tokens]
    tied = {"lm_head.weight": "model.embed_tokens.weight"} if config.tie_word_embeddings else {}
    return WeightMap(
        placements=tuple(model.placements()),
        parameters=parameters,
        aliases=tied,
        fused=dict(model.fused_names()),
        ignored=frozenset(
            f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"
            for layer in range(config.num_layers)
        ),
    )
