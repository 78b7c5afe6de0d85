"""The way from a publisher to a receiver of its own process."""

from __future__ import annotations

import time
from concurrent.futures import Future
from typing import Any

import torch

from ..errors import EngineDiedError
from ..wire.futures import wait
from ..wire.local_call import LocalCall
from ..wire.process import Home
from .service import WeightService


class LocalChannel:
    """To a service of this process: messages are handed over as objects, buffers as tensors."""

    def __init__(self, service: WeightService) -> None:
        self._service = service
        self._home = Home("the engine")
        self._closed = False

    def call(self, message: Any, timeout_s: float) -> Any:
        return wait(self.submit(message, timeout_s), timeout_s, type(message).__name__)

    def submit(self, message: Any, timeout_s: float) -> Future[Any]:
        self._home.check()
        call = LocalCall(message, time.monotonic() + timeout_s)
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
