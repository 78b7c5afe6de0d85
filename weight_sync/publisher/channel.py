"""How a publisher talks to a receiver: in its own process, or over a connection. The messages are the same."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol

import torch

from ..errors import ERRORS, DeadlineExceeded, EngineDiedError, TransportError
from ..receiver.service import WeightService
from ..wire.messages import WeightReply
from ..wire.rpc_client import RpcClient

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

    def close(self) -> None:
        """Give back what this end holds; the engine goes on."""


class _LocalCall:
    """`rpc.Call` without a connection."""

    __slots__ = ("_lock", "body", "deadline", "future")

    def __init__(self, body: Any, timeout_s: float) -> None:
        self.body = body
        self.deadline = time.monotonic() + timeout_s
        self.future: Future[Any] = Future()
        self._lock = threading.Lock()

    @property
    def peer(self) -> str:
        return "local"

    def reply(self, body: Any) -> None:
        self._answer(lambda: self.future.set_result(body))

    def stream(self, body: Any) -> None:
        raise NotImplementedError("weight messages have one reply each")

    def fail(self, error: BaseException) -> None:
        self._answer(lambda: self.future.set_exception(error))

    def _answer(self, answer: Callable[[], None]) -> None:
        with self._lock:
            if not self.future.done():
                answer()


class LocalChannel:
    """To a service of this process: messages are handed over as objects, buffers as tensors."""

    def __init__(self, service: WeightService) -> None:
        self._service = service
        self._closed = False

    def call(self, message: Any, timeout_s: float) -> Any:
        return wait(self.submit(message, timeout_s), message, timeout_s)

    def submit(self, message: Any, timeout_s: float) -> "Future[Any]":
        call = _LocalCall(message, timeout_s)
        if self._closed:
            call.fail(EngineDiedError("the channel was closed; make a new one"))
        else:
            self._service.handle(call)
        return call.future

    @property
    def is_local(self) -> bool:
        return True

    def lend(self, buffer: torch.Tensor) -> str:
        return self._service.lend(buffer)

    @property
    def dead(self) -> str | None:
        return "the channel was closed; make a new one" if self._closed else None

    def close(self) -> None:
        self._closed = True


class RpcChannel:
    """Over a connection. `close` ends the connection only where the channel owns it."""

    def __init__(self, client: RpcClient, *, owned: bool = False) -> None:
        self._client = client
        self._owned = owned

    @classmethod
    def connect(cls, address: str) -> "RpcChannel":
        """To an engine that someone else started."""
        client = RpcClient(
            address,
            WeightReply,
            errors=ERRORS,
            connect_timeout_s=CONNECT_TIMEOUT_S,
            name="weights",
        )
        return cls(client, owned=True)

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

    def close(self) -> None:
        if self._owned:
            self._client.close()


def wait(future: "Future[Any]", message: Any, timeout_s: float) -> Any:
    """The result of a submitted call, or `DeadlineExceeded`; whatever arrives later is dropped."""
    try:
        return future.result(timeout_s)
    except TimeoutError as error:
        if isinstance(error, DeadlineExceeded):
            raise
        raise DeadlineExceeded(
            f"{type(message).__name__} was not answered within {timeout_s:.3f} s; whatever arrives later is "
            "dropped; raise the timeout or look at the engine"
        ) from None
