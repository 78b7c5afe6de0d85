"""Rollout engine for RL post-training: `Engine` generates, and takes new weights while it runs.

Names are loaded when they are first used, so that importing this package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import EngineConfig
    from .engine.base import EngineBase
    from .engine.engine import Engine
    from .pool.actor import RolloutActor
    from .pool.pool import RolloutPool
    from .sampling_params import SamplingParams

__version__ = "0.1.0"

_HOMES = {
    "Engine": ".engine.engine",
    "EngineBase": ".engine.base",
    "EngineConfig": ".config",
    "RolloutActor": ".pool.actor",
    "RolloutPool": ".pool.pool",
    "SamplingParams": ".sampling_params",
}

__all__ = [
    "Engine",
    "EngineBase",
    "EngineConfig",
    "RolloutActor",
    "RolloutPool",
    "SamplingParams",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name], __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
