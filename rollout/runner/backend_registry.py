"""The backends by name, which of them a device gets, and what stands against the others there."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..errors import ConfigError
from .attention_backend import AttentionBackend, BackendContext, BackendNeeds

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendEntry:
    """A backend as the registry knows it; its file is imported when it is wanted."""

    make: Callable[[BackendContext], AttentionBackend]
    """The backend itself."""
    why_not: Callable[[BackendNeeds], str | None]
    """What was got and what was expected, where it cannot serve; None: it can."""


def _torch(context: BackendContext) -> AttentionBackend:
    from .torch_backend import TorchBackend

    return TorchBackend(context)


def _triton(context: BackendContext) -> AttentionBackend:
    from .triton_backend import TritonBackend

    return TritonBackend(context)


def _flash(context: BackendContext) -> AttentionBackend:
    from .flash_backend import FlashBackend

    return FlashBackend(context)


def _nothing(needs: BackendNeeds) -> str | None:
    return None


def _why_not_triton(needs: BackendNeeds) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "no triton, expected it to be installed"
    if needs.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"device {needs.device}, expected CUDA (or TRITON_INTERPRET=1, for tests)"
    return None


def _why_not_flash(needs: BackendNeeds) -> str | None:
    if needs.device.type != "cuda":
        return f"device {needs.device}, expected CUDA"
    from .flash_backend import why_not

    return _why_not_triton(needs) or why_not(needs)


BACKENDS: dict[str, BackendEntry] = {
    "torch": BackendEntry(make=_torch, why_not=_nothing),
    "triton": BackendEntry(make=_triton, why_not=_why_not_triton),
    "flash": BackendEntry(make=_flash, why_not=_why_not_flash),
}
"""Every backend: "torch" runs on any device, "triton" on CUDA (and in triton's interpreter), "flash" on CUDA where
torch has paged attention."""


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


def check_backend(name: str, needs: BackendNeeds) -> None:
    """`ConfigError` where the backend of a resolved name cannot serve."""
    reason = BACKENDS[name].why_not(needs)
    if reason is not None:
        raise ConfigError(
            f"attention_backend {name!r}: got {reason}; leave it out for the fastest that serves here"
        )


def make_backend(name: str, context: BackendContext) -> AttentionBackend:
    """The backend of a resolved name, which `check_backend` let pass; it and its alternatives are logged."""
    backend = BACKENDS[name].make(context)
    needs = BackendNeeds(
        device=context.device,
        dtype=context.dtype,
        head_dim=context.config.head_dim,
        block_size=context.block_size,
    )
    others = []
    for other, entry in BACKENDS.items():
        if other != name:
            reason = entry.why_not(needs)
            others.append(other if reason is None else f"{other} not: {reason}")
    logger.info("attention backend on %s: %s (others: %s)", context.device, name, "; ".join(others))
    return backend
