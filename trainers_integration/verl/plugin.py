"""What verl finds by name when it is imported (entry point group `verl.plugins`): the rollout and checkpoint engine.

verl imports this while it is being imported itself, in every process, so nothing here touches more of it than the three
tables. verl swallows what a plugin raises; a failure is logged here, where it would otherwise show up much later as an
unknown rollout.
"""

from __future__ import annotations

import logging
from importlib import metadata
from typing import Any

from rollout.errors import ConfigError

from .checkpoint_engine import PublishingCheckpointEngine
from .options import NAME
from .replica import ReplicaServers

logger = logging.getLogger(__name__)

SERIES = "0.9"
"""The releases of verl that this was read in and is tested with."""
_INSTALL = "expected verl 0.9.1 with its dependencies; pip install 'rollout-sync[verl]'"


def register() -> None:
    """Enter the rollout and the checkpoint engine into verl's tables.

    Raises `ConfigError` for another series of verl, whose interfaces may be others, and whatever verl does.
    """
    import verl  # perhaps not whole yet

    version = str(getattr(verl, "__version__", None) or metadata.version("verl"))
    if version.split(".")[:2] != SERIES.split("."):
        raise ConfigError(f"got verl {version}")
    from verl.checkpoint_engine.base import CheckpointEngineRegistry
    from verl.workers.rollout.base import _ROLLOUT_REGISTRY
    from verl.workers.rollout.replica import RolloutReplicaRegistry

    _ROLLOUT_REGISTRY[(NAME, "async")] = "trainers_integration.verl.adapter.ServerAdapter"
    RolloutReplicaRegistry.register(NAME, replica_class)
    CheckpointEngineRegistry.register(NAME)(PublishingCheckpointEngine)


def replica_class() -> type[Any]:
    """verl's replica with our servers; made when it is asked for, since verl must be complete by then."""
    from verl.workers.rollout.replica import RolloutReplica

    return type("RolloutSyncReplica", (ReplicaServers, RolloutReplica), {"__module__": __name__})


def _register_if_possible() -> None:
    try:
        register()
    except (ImportError, ConfigError) as error:
        if getattr(error, "name", None) != "verl":  # else verl is not there at all
            logger.warning(
                "rollout.name=%s is not available in verl: %s; %s", NAME, error, _INSTALL
            )


_register_if_possible()
