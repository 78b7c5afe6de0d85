"""How a step is computed between its matrix products: what a backend is, and what it is made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from ..layers.step import LayerStep
from ..models.decoder import Decoder, GivenRows
from ..models.model_config import ModelConfig
from ..scheduling.batch import ScheduledBatch, ScheduledItem
from ..scheduling.request import Request
from .kv_pool import KVPool


@dataclass(frozen=True, slots=True)
class DrawnTokens:
    """Tokens of the step before that the host may not know yet."""

    tokens: torch.Tensor
    """(R) integers on the model's device."""
    rows: dict[Request, int]
    """Who drew which of them."""


def given_rows(
    items: Sequence[ScheduledItem],
) -> tuple[npt.NDArray[np.int64], torch.Tensor] | None:
    """Of prompts that are rows in place of tokens: which tokens of the step, in item order, and the rows for them.

    None: there are none, and that is all that other steps pay.
    """
    if all(item.request.input_embeds is None for item in items):
        return None
    places: list[int] = []
    values: list[torch.Tensor] = []
    first = 0
    for item in items:
        rows = item.request.input_embeds
        if rows is not None and item.start < len(rows):
            values.append(rows[item.start : item.end])  # what lies behind the prompt has tokens
            places += range(first, first + len(values[-1]))
        first += item.length
    return (np.array(places, np.int64), torch.cat(values)) if places else None


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedStep:
    """What the model needs for one step."""

    token_ids: torch.Tensor
    """(T), in row order."""
    step: LayerStep
    """Everything else."""
    item_rows: torch.Tensor | None
    """(T): the row of each token in item order; None: rows are in item order."""
    given: GivenRows | None = None
    """Rows that stand in for tokens; None: there are none."""


class AttentionBackend(Protocol):
    """Plans each step once; the plan is then called by every layer. Further libraries are one file each."""

    name: str
    """As in the registry."""
    on_device: bool
    """Its steps are a `TritonStep`, fed by one small copy: tokens are drawn on the device too, and a CUDA graph can
    hold a step."""

    def plan(self, batch: ScheduledBatch, drawn: DrawnTokens | None) -> PlannedStep:
        """Make the block copies of `batch`, and plan it; tokens that are still `PENDING` are taken from `drawn`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendNeeds:
    """What decides whether a backend can serve, known before anything is started."""

    device: torch.device
    """Where the model will be."""
    dtype: torch.dtype
    """Of activations and the KV pool."""
    head_dim: int
    """Numbers of an attention head."""
    block_size: int
    """Tokens per KV block."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendContext:
    """What a backend is made for."""

    config: ModelConfig
    """The model's sizes."""
    model: Decoder
    """For its rotary frequencies and heads."""
    kv_pool: KVPool
    """Keys and values of all layers."""
    dtype: torch.dtype
    """Of activations."""
    device: torch.device
    """Of everything."""
    block_size: int
    """Tokens per KV block."""
    max_batch: int
    """Sequences of a step at most."""
    deterministic: bool = False
    """A token's results have the same bits in any batch; for backends that can."""
