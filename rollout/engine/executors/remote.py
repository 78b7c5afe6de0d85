"""An engine, or a pool, that another process started; this end has a connection, and closes no more than that."""

from __future__ import annotations

import dataclasses

import msgspec

from weight_sync.wire.rpc import RpcClient

from ...config import EngineConfig
from ...errors import ERRORS
from ...protocol.commands import GetStatus, Status
from ...protocol.wire import REPLY_TYPES
from .over_rpc import OverRpc


class RemoteExecutor(OverRpc):
    """Carries commands to an address."""

    def __init__(self, address: str, *, timeout_s: float) -> None:
        """`EngineDiedError` when nobody answers there within `timeout_s`."""
        self._address = address
        self._client = RpcClient(address, REPLY_TYPES, errors=ERRORS, connect_timeout_s=timeout_s)
        try:
            # The connection alone looks at the clock: it knows whether anybody is there.
            status: Status = self._client.call(GetStatus(), timeout_s)
        except BaseException:
            self._connection.close()
            raise
        self.config = _config_of(status)
        """What the engine runs with, as far as a client needs it."""

    def close(self) -> None:
        self._connection.close()


def _config_of(status: Status) -> EngineConfig:
    """The configuration that a status tells; fields that mean nothing to this release keep their defaults."""
    known = {field.name for field in dataclasses.fields(EngineConfig)}
    told = {name: value for name, value in status.resolved.items() if name in known}
    told.setdefault("model_path", "")
    return msgspec.convert(told, EngineConfig, strict=False)
