"""All typed errors that an engine raises: its own, and those of weight updates, which `weight_sync.errors` defines.

They are the same in every executor, in pools and in Ray actors, and they can be pickled.
"""

from __future__ import annotations

from weight_sync.errors import ERRORS as SYNC_ERRORS
from weight_sync.errors import (
    AddressInUseError,
    ArenaGoneError,
    ConnectionLostError,
    DeadlineExceeded,
    EngineDiedError,
    EngineRestartedError,
    FingerprintMismatch,
    ForkedProcessError,
    InsecureAddressError,
    ManifestMismatch,
    NonFiniteWeightsError,
    PayloadRefused,
    ProtocolError,
    RemoteError,
    SessionBusy,
    SessionError,
    StaleVersionError,
    SyncError,
    TornWeightsError,
    TrainerDiedError,
    TransportError,
    UnauthorizedError,
    WeightUpdateError,
)


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


class NoUpdateYetError(TornWeightsError):
    """The engine waits for its first complete update (`await_first_update`); what it has loaded must not be used."""

    STATE = "no update has come yet"
    """How the reason begins for which such an engine says that it is torn."""

    @classmethod
    def found(cls, torn: str | None) -> NoUpdateYetError | None:
        """The error for an engine or a pool that is torn for this reason; None: it is another, or none."""
        if torn is None or not torn.startswith(cls.STATE):
            return None
        return cls(
            f"cannot generate: got the weights that were there at the start, expected a complete update ({torn}); "
            "publish one first, or start with await_first_update=False"
        )


class NoProgressError(RolloutError, DeadlineExceeded):
    """The engine has been at one step for longer than `progress_timeout_s`; it hangs, and must be started anew."""


class EngineStepError(RolloutError):
    """A step of the engine failed; the requests that ran in it were ended with this error, the others go on."""


class NonFiniteLogitsError(EngineStepError):
    """Logits that are no distribution: NaN, infinite, or nothing that may be drawn; other requests go on."""

    rows: tuple[int, ...] = ()
    """Which rows of the step; known where the step was computed."""


class RequestAbortedError(RolloutError):
    """What was asked for was ended early, and a part of it is worth nothing: a score, an embedding. Ask again."""


class UnexpectedError(RolloutError):
    """The engine failed where it should not; the message names the error, the engine's log says where it came from."""


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
            NoProgressError,
            NoUpdateYetError,
            NonFiniteLogitsError,
            EngineStepError,
            RequestAbortedError,
            UnexpectedError,
        )
    },
}


def typed(error: BaseException, what: str) -> Exception:
    """`error` where callers know its type, else an `UnexpectedError` that names it: what a caller in another process
    gets, one in the engine's gets too."""
    if isinstance(error, Exception) and ERRORS.get(type(error).__name__) is type(error):
        return error
    found = UnexpectedError(
        f"{what} failed with {type(error).__name__}: {error}; look at the engine's log"
    )
    found.__cause__ = error
    return found


__all__ = [
    "ERRORS",
    "AddressInUseError",
    "ArenaGoneError",
    "CheckpointError",
    "ConfigError",
    "ConnectionLostError",
    "DeadlineExceeded",
    "EngineClosedError",
    "EngineDiedError",
    "EngineRestartedError",
    "EngineStepError",
    "FingerprintMismatch",
    "ForkedProcessError",
    "InsecureAddressError",
    "InvalidRequestError",
    "ManifestMismatch",
    "NoProgressError",
    "NoUpdateYetError",
    "NonFiniteLogitsError",
    "NonFiniteWeightsError",
    "PayloadRefused",
    "ProtocolError",
    "RemoteError",
    "RequestAbortedError",
    "RolloutError",
    "SessionBusy",
    "SessionError",
    "StaleVersionError",
    "SyncError",
    "TornWeightsError",
    "TrainerDiedError",
    "TransportError",
    "UnauthorizedError",
    "UnexpectedError",
    "WeightUpdateError",
    "typed",
]
