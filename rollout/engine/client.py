"""What all parts of `Engine` share: the executor, the tokenizer, and deadlines."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any, TypeVar

import msgspec

from weight_sync.wire.futures import answer_of, wait
from weight_sync.wire.process import Home

from ..config import EngineConfig
from ..errors import EngineClosedError, InvalidRequestError
from ..tokenizer import Tokenizer
from .base import EngineBase
from .executors.executor import Executor

MAX_TIMEOUT_S = 7 * 86_400
"""As `weight_sync.wire`: every remote call has a deadline."""


class EngineClient(EngineBase):
    """Base of the mixins that make up `Engine`; holds no engine state, which lives where the loop runs."""

    config: EngineConfig
    _home: Home
    _tokenizer: Tokenizer | None
    _maybe_executor: Executor | None

    @property
    def _executor(self) -> Executor:
        self._home.check()
        if self._maybe_executor is None:
            raise EngineClosedError("the engine was shut down; start a new one")
        return self._maybe_executor

    def _timeout(self, timeout_s: float | None) -> float:
        """The deadline of a call in seconds: the caller's, else the configured one."""
        if timeout_s is None:
            return self.config.request_timeout_s
        return self._positive(timeout_s)

    @staticmethod
    def _positive(timeout_s: float) -> float:
        if not (isinstance(timeout_s, (int, float)) and 0 < timeout_s <= MAX_TIMEOUT_S):
            raise InvalidRequestError(
                f"timeout_s: got {timeout_s!r}, expected a positive number of seconds, at most a week ({MAX_TIMEOUT_S})"
            )
        return float(timeout_s)

    def _call(self, body: Any, timeout_s: float | None = None) -> Any:
        """Send one command and wait for its answer."""
        body, limit = sendable(body), self._timeout(timeout_s)
        return wait(self._executor.submit(body, timeout_s=limit), limit, type(body).__name__)

    async def _async_call(self, body: Any, timeout_s: float | None = None) -> Any:
        """As `_call`, awaitable, without a thread."""
        body, limit = sendable(body), self._timeout(timeout_s)
        future = self._executor.submit(body, timeout_s=limit)
        return await answer_of(future, limit, type(body).__name__)


T = TypeVar("T")


def sendable(command: T) -> T:
    """`command` as a message carries it: an engine of this process takes what one elsewhere would, and nothing else.

    `InvalidRequestError` names the field; whole numbers of any library are Python's.
    """
    kind = type(command)
    try:
        message = msgspec.msgpack.encode(command, enc_hook=_as_number)
        return msgspec.msgpack.decode(message, type=kind)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidRequestError(
            f"{kind.__name__}: {error}; correct the call's arguments"
        ) from None


def _as_number(value: Any) -> int | float:
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    raise TypeError(f"got {type(value).__name__}, which no message carries")
