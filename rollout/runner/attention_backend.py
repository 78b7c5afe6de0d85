"""How a step is computed between its matrix products: one protocol, one registry, one setting."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from ..errors import ConfigError
from ..layers.step import LayerStep
from ..models.decoder import Decoder
from ..models.model_config import ModelConfig
from ..scheduling.batch import ScheduledBatch
from ..scheduling.request import Request
from .kv_pool import KVPool

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DrawnTokens:
    """Tokens of the step before that the host may not know yet."""

    tokens: torch.Tensor
    """(R) int32 on the model's device."""
    rows: dict[Request, int]
    """Who drew which of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedStep:
    """What the model needs for one step."""

    token_ids: torch.Tensor
    """(T), in row order."""
    step: LayerStep
    """Everything else."""
    item_rows: torch.Tensor | None
    """(T): the row of each token in item order; None: rows are in item order."""


class AttentionBackend(Protocol):
    """Plans each step once; the plan is then called by every layer. Further libraries are one file each."""

    name: str
    """As in `BACKENDS`."""

    def plan(self, batch: ScheduledBatch, drawn: DrawnTokens | None) -> PlannedStep:
        """Make the block copies of `batch`, and plan it; tokens that are still `PENDING` are taken from `drawn`."""


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


def _torch(context: BackendContext) -> AttentionBackend:
    from .torch_backend import TorchBackend

    return TorchBackend(context)


def _triton(context: BackendContext) -> AttentionBackend:
    from .triton_backend import TritonBackend

    return TritonBackend(context)


BACKENDS: dict[str, Callable[[BackendContext], AttentionBackend]] = {
    "torch": _torch,
    "triton": _triton,
}
"""Every backend; "torch" runs on any device, "triton" on CUDA (and in triton's interpreter)."""


def resolve_backend(name: str, device: torch.device | str) -> str:
    """The backend that "auto" means on `device`, or `name` itself; `ConfigError` where nobody has that name."""
    if name == "auto":
        return "triton" if torch.device(device).type == "cuda" else "torch"
    if name not in BACKENDS:
        raise ConfigError(
            f"attention_backend: got {name!r}, expected 'auto' or one of {', '.join(BACKENDS)}; "
            "leave it out for the fastest"
        )
    return name


def make_backend(name: str, context: BackendContext) -> AttentionBackend:
    """The backend of a resolved name; what was chosen, and what else there is, is logged."""
    backend = BACKENDS[name](context)
    others = ", ".join(other for other in BACKENDS if other != name)
    logger.info("attention backend on %s: %s (others: %s)", context.device, name, others)
    return backend
