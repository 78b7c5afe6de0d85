"""What executors have in common whose loop is in another process: one connection, over which everything goes."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

from weight_sync.wire.channel import Channel, RpcChannel
from weight_sync.wire.rpc import RpcClient

from .executor import OnChunk


class OverRpc:
    """Base of executors that set both once the other side is there."""

    _address: str
    _client: RpcClient | None = None

    def submit(
        self, body: Any, *, timeout_s: float, on_chunk: OnChunk | None = None
    ) -> Future[Any]:
        return self._connection.submit(body, timeout_s=timeout_s, on_chunk=on_chunk)

    def weight_channel(self) -> Channel:
        return RpcChannel(self._connection)

    @property
    def address(self) -> str:
        return self._address

    @property
    def _connection(self) -> RpcClient:
        assert self._client is not None, "the executor is still starting"
        return self._client
