"""Typed errors of the weight-sync layer.

Every message says what went wrong, what was got, what was expected, and what to do. The class names travel over the
wire as error codes, so a trainer in another process catches the same types as one in the engine's process.
"""

from __future__ import annotations


class SyncError(RuntimeError):
    """Root of everything that this package raises on purpose."""


class ProtocolError(SyncError):
    """A message that cannot be understood: malformed, too large, of another protocol version, or out of order."""


class DeadlineExceeded(SyncError, TimeoutError):
    """A call was not answered within its deadline; whatever arrives later is dropped."""


class EngineDiedError(SyncError, ConnectionError):
    """The process that serves the engine is gone; the call will never be answered."""


class ConnectionLostError(SyncError, ConnectionError):
    """The connection broke under a call, and the engine lives: whether it carried the call out is not known. Later
    calls go over a new connection."""


class ForkedProcessError(SyncError):
    """A forked child used what belongs to its parent: a connection, an engine, a publisher. Nothing was touched."""


class AddressInUseError(SyncError):
    """Another server listens at the address; nothing was taken from it, and nothing was started."""


class InsecureAddressError(SyncError, ValueError):
    """Others could reach the address, and nothing would keep them out; nothing was started."""


class UnauthorizedError(SyncError, PermissionError):
    """The server takes nobody without its key, or its key is another one; nothing was sent."""


class TrainerDiedError(SyncError, ConnectionError):
    """A rank of the trainer is gone, and the others cannot publish without its shards; the engine keeps its version."""


class RemoteError(SyncError):
    """The other side failed with an error that has no class here; the message names its type."""


class WeightUpdateError(SyncError):
    """An update was refused or failed. The old version goes on serving, unless the subclass is `TornWeightsError`."""


class ManifestMismatch(WeightUpdateError, ValueError):
    """The tensors do not fit the model; the message lists every unknown, missing, doubled or misshapen one."""


class FingerprintMismatch(WeightUpdateError):
    """Bytes differ from what the trainer declared: staged bytes before the commit, or resident bytes after it."""


class SessionBusy(WeightUpdateError):
    """Another update session is open; the message names its holder and the lease that it has left."""


class SessionError(WeightUpdateError):
    """No such session: never opened, expired, aborted, or of an older epoch."""


class StaleVersionError(WeightUpdateError, ValueError):
    """The version is not above the engine's, or `base_version` is not the one that it serves."""


class EngineRestartedError(WeightUpdateError):
    """The engine behind an address is another one than the one that was published to, and serves what it has loaded."""


class TransportError(WeightUpdateError):
    """The bytes cannot be reached or carried: the arena cannot be opened, is too small, or is not what it claims."""


class PayloadRefused(WeightUpdateError, ValueError):
    """A serialized payload holds something else than tensors in shared memory; nothing of it was executed or kept."""


class ArenaGoneError(TransportError):
    """The engine has no arena of that id (any more); a publisher opens another one and goes on."""


class NonFiniteWeightsError(WeightUpdateError, ValueError):
    """Tensors have NaN or infinite values; the message names them, and nothing was written."""


class TornWeightsError(WeightUpdateError):
    """The resident weights are a mixture; the engine refuses to generate until a complete update has committed."""


#: Error codes on the wire, by class name.
ERRORS: dict[str, type[Exception]] = {
    cls.__name__: cls
    for cls in (
        SyncError,
        ProtocolError,
        DeadlineExceeded,
        EngineDiedError,
        ConnectionLostError,
        ForkedProcessError,
        AddressInUseError,
        InsecureAddressError,
        UnauthorizedError,
        TrainerDiedError,
        RemoteError,
        WeightUpdateError,
        ManifestMismatch,
        FingerprintMismatch,
        SessionBusy,
        SessionError,
        StaleVersionError,
        EngineRestartedError,
        TransportError,
        PayloadRefused,
        ArenaGoneError,
        NonFiniteWeightsError,
        TornWeightsError,
    )
}
