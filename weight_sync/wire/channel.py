"""How a publisher talks to a receiver. The messages are the same over a connection and inside one process."""

from concurrent.futures import Future
from typing import Any, Protocol

import torch

from ..errors import ERRORS, TransportError
from .messages import WeightReply
from .rpc_client import RpcClient

CONNECT_TIMEOUT_S = 5.0


class Channel(Protocol):
    """A way to one life of one engine."""

    def call(self, message: Any, timeout_s: float) -> Any:
        """Send, wait, return the reply or raise what the engine raised."""

    def submit(self, message: Any, timeout_s: float) -> "Future[Any]":
        """Send without waiting; messages arrive in the order in which they were submitted."""

    @property
    def is_local(self) -> bool:
        """The engine lives in this process and can read its buffers."""

    def lend(self, buffer: torch.Tensor) -> str:
        """The key for a `LocalHandle` of a buffer of this process; only where `is_local`."""

    @property
    def dead(self) -> str | None:
        """Why nothing will ever be answered again, or None."""

    def close(self, *, wait: bool = True) -> None:
        """Give back what this end holds; the engine goes on. Without `wait` it blocks nowhere."""


def connect_weights(address: str) -> RpcClient:
    """A connection for messages about weights."""
    return RpcClient(
        address, WeightReply, errors=ERRORS, connect_timeout_s=CONNECT_TIMEOUT_S, name="weights"
    )


class RpcChannel:
    """Over a connection. `close` ends the connection only where the channel owns it."""

    def __init__(self, client: RpcClient, *, owned: bool = False) -> None:
        self._client = client
        self._owned = owned

    @classmethod
    def connect(cls, address: str) -> "RpcChannel":
        """To an engine that someone else started."""
        return cls(connect_weights(address), owned=True)

    def call(self, message: Any, timeout_s: float) -> Any:
        return self._client.call(message, timeout_s)

    def submit(self, message: Any, timeout_s: float) -> "Future[Any]":
        return self._client.submit(message, timeout_s)

    @property
    def is_local(self) -> bool:
        return False

    def lend(self, buffer: torch.Tensor) -> str:
        raise TransportError(
            "the engine is in another process: it cannot read a buffer of this one"
        )

    @property
    def dead(self) -> str | None:
        return self._client.dead

    def close(self, *, wait: bool = True) -> None:
        """Without `wait` it takes no lock and blocks nowhere, as `RpcClient.close`."""
        if self._owned:
            self._client.close(wait=wait)
