"""The way from a publisher to a receiver of its own process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch

from ..errors import EngineDiedError
from ..wire.channel import wait
from ..wire.process import Home
from .service import WeightService


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
        self._home = Home("the engine")
        self._closed = False

    def call(self, message: Any, timeout_s: float) -> Any:
        return wait(self.submit(message, timeout_s), message, timeout_s)

    def submit(self, message: Any, timeout_s: float) -> Future[Any]:
        self._home.check()
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

    def close(self, *, wait: bool = True) -> None:
        self._closed = True
