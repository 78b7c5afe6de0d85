"""The backends by name, and which of them a device gets."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from ..errors import ConfigError
from .attention_backend import AttentionBackend, BackendContext

logger = logging.getLogger(__name__)


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
