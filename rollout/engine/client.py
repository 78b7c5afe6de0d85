"""What all parts of `Engine` share: the executor, the tokenizer, and deadlines."""

from __future__ import annotations

from typing import Any

from weight_sync.wire.process import Home

from ..config import EngineConfig
from ..errors import EngineClosedError, InvalidRequestError
from ..tokenizer import Tokenizer
from .base import EngineBase
from .executors.executor import Executor, answer_of, wait

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
        limit = self._timeout(timeout_s)
        return wait(self._executor.submit(body, timeout_s=limit), limit, type(body).__name__)

    async def _async_call(self, body: Any, timeout_s: float | None = None) -> Any:
        """As `_call`, awaitable, without a thread."""
        limit = self._timeout(timeout_s)
        future = self._executor.submit(body, timeout_s=limit)
        return await answer_of(future, limit, type(body).__name__)
