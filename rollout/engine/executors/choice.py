"""Which executor a configuration names; Ray is loaded only for its own."""

from __future__ import annotations

from ...config import EngineConfig
from .executor import Executor, InlineExecutor


def make_executor(config: EngineConfig) -> Executor:
    """The executor that `config.executor` names."""
    if config.executor == "inline":
        return InlineExecutor(config)
    if config.executor == "local":
        from .local import LocalExecutor

        return LocalExecutor(config)
    from .ray import RayExecutor

    return RayExecutor(config)
