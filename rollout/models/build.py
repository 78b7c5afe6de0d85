"""Make a model: its structure on the meta device first, then all parameters at once as views of an arena."""

from __future__ import annotations

from collections.abc import Callable

import torch

from weight_sync.layout.weight_map import WeightMap

from ..layers.embedding import VocabParallelEmbedding
from ..layers.router import Router
from ..layers.single_group import SingleGroup, TensorParallelGroup
from .arena import ParameterArena
from .decoder import Decoder
from .model_config import ModelConfig


def build_model(
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device | str,
    tp: TensorParallelGroup | None = None,
    ep_size: int = 1,
) -> Decoder:
    """This rank's part of the model, all zeros, with its weight map; a loader fills it.

    `ep_size`: over how many ranks the experts of a layer are spread; a divisor of the group's size.
    """
    device = torch.device(device)
    with torch.device("meta"):
        model = Decoder(config, tp or SingleGroup(), device, ep_size).to(dtype)
        for module in model.modules():
            if isinstance(module, Router):
                module.keep_float32()
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
    return WeightMap(
        placements=tuple(model.placements()),
        parameters=parameters,
        aliases=dict(model.aliases()),
        fused=dict(model.fused_names()),
        ignored=_ignored(config),
    )


def _ignored(config: ModelConfig) -> Callable[[str], bool]:
    """Names of what is computed here, and of layers that predict tokens further ahead."""
    layers = (f"model.layers.{layer}.self_attn" for layer in range(config.num_layers))
    # Where old checkpoints have them, and where the buffers of a model are today.
    frequencies = frozenset(f"{layer}.rotary_emb.inv_freq" for layer in layers) | {
        "model.rotary_emb.inv_freq",
        "model.rotary_emb.original_inv_freq",
    }
    further = tuple(
        f"model.layers.{config.num_layers + layer}." for layer in range(config.num_mtp_layers)
    )
    return lambda name: name in frequencies or (bool(further) and name.startswith(further))
