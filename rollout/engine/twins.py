"""A call to the engine that is written once and is there twice: waiting for its answer, and as an `async_` method.

    @asks
    def abort_request(self, rid: str) -> Asking[int]:
        '''End a request; returns how many ended.'''
        answer: Done = yield AbortRequests(rids=[rid])
        return answer.count

    async_abort_request = awaitable(abort_request)

What does more than ask the engine has its twin on a thread: `weight_sync.wire.cancellation.threaded`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Coroutine, Generator
from typing import Any, Concatenate, ParamSpec, TypeVar

from weight_sync.wire.cancellation import name_twin

from .client import EngineClient

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S", bound=EngineClient)

Asking = Generator[Any, Any, R]
"""The definition of a call: it yields commands, is sent their answers, and returns the call's result."""


def asks(define: Callable[Concatenate[S, P], Asking[R]]) -> Callable[Concatenate[S, P], R]:
    """The call that waits for each answer, for `timeout_s` seconds where `define` has such an argument, else for the
    engine's `request_timeout_s`. Raises what the engine answers, and `DeadlineExceeded`."""
    limit_of = _limit_of(define)

    @functools.wraps(define)
    def call(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        asking = define(self, *args, **kwargs)
        limit = limit_of(self, *args, **kwargs)
        answer = None
        while True:
            try:
                command = asking.send(answer)
            except StopIteration as end:
                result: R = end.value
                return result
            answer = self._call(command, limit)

    signature = inspect.signature(define)
    returned = str(signature.return_annotation).removeprefix("Asking[").removesuffix("]")
    call.__dict__["__signature__"] = signature.replace(return_annotation=returned)
    return call


def awaitable(
    call: Callable[Concatenate[S, P], R],
) -> Callable[Concatenate[S, P], Coroutine[Any, Any, R]]:
    """The twin of a call that `asks`, without a thread. Cancelling it gives up the answer, not what was asked."""
    define: Callable[Concatenate[S, P], Asking[R]] = inspect.unwrap(call)
    limit_of = _limit_of(define)

    @functools.wraps(call)
    async def twin(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        asking = define(self, *args, **kwargs)
        limit = limit_of(self, *args, **kwargs)
        answer = None
        while True:
            try:
                command = asking.send(answer)
            except StopIteration as end:
                result: R = end.value
                return result
            answer = await self._async_call(command, limit)

    named: Callable[Concatenate[S, P], Coroutine[Any, Any, R]] = name_twin(twin, call)
    return named


def _limit_of(define: Callable[..., Any]) -> Callable[..., float | None]:
    """What a call was given for its `timeout_s`."""
    signature = inspect.signature(define)
    if "timeout_s" not in signature.parameters:
        return lambda *args, **kwargs: None
    return lambda *args, **kwargs: signature.bind(*args, **kwargs).arguments.get("timeout_s")
