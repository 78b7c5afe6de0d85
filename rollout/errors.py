"""Typed errors of the engine; those of weight updates are `weight_sync.errors`."""

from __future__ import annotations

from weight_sync.errors import ERRORS as SYNC_ERRORS
from weight_sync.errors import TornWeightsError


class RolloutError(RuntimeError):
    """Root of the engine's own errors."""


class InvalidRequestError(RolloutError, ValueError):
    """A request that cannot be run: unknown or out-of-range parameter, too long, token outside the vocabulary."""


class ConfigError(RolloutError, ValueError):
    """A configuration that cannot be resolved; an unknown key is answered with the nearest known one."""


class CheckpointError(RolloutError, ValueError):
    """A checkpoint folder that is incomplete, of an unknown family, or does not fit its configuration."""


class EngineClosedError(RolloutError):
    """The engine was shut down; start a new one."""


class MemoryReleasedError(RolloutError):
    """A call that needs memory which `release_memory_occupation` gave back; resume it first."""


class EngineStepError(RolloutError):
    """A step of the engine failed; the requests that ran in it were ended with this error, the others go on."""


#: Error codes on the wire, by class name.
ERRORS: dict[str, type[Exception]] = {
    **SYNC_ERRORS,
    "ValueError": ValueError,
    "TypeError": TypeError,
    **{
        cls.__name__: cls
        for cls in (
            RolloutError,
            InvalidRequestError,
            ConfigError,
            CheckpointError,
            EngineClosedError,
            MemoryReleasedError,
            EngineStepError,
        )
    },
}

__all__ = [
    "ERRORS",
    "CheckpointError",
    "ConfigError",
    "EngineClosedError",
    "EngineStepError",
    "InvalidRequestError",
    "MemoryReleasedError",
    "RolloutError",
    "TornWeightsError",
]
