"""TRL trains, an engine of this package generates; no vLLM is needed.

    attach(trainer, engine)             # GRPOTrainer, RLOOTrainer: this one line
    GRPOTrainer(..., rollout_func=rollout_func(engine))
    AsyncGRPOTrainer(..., rollout_worker=RolloutWorker(engine, ...), weight_transfer=WeightTransfer(engine))

docs/trainers/trl.md says what each does. TRL is imported when one of them is called.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .attach import attach
    from .hook import rollout_func
    from .transfer import WeightTransfer
    from .worker import RolloutWorker

_HOMES = {
    "RolloutWorker": ".worker",
    "WeightTransfer": ".transfer",
    "attach": ".attach",
    "rollout_func": ".hook",
}

__all__ = ["RolloutWorker", "WeightTransfer", "attach", "rollout_func"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name], __name__), name)
    globals()[name] = value  # A submodule of the same name must not stand in its place.
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
