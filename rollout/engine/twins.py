"""A call to the engine that is written once and is there twice: waiting for its answer, and as an `async_` method.

    @asks
    def abort_request(self, rid: str) -> Asking[int]:
        '''End a request; returns how many ended.'''
        answer: Done = yield AbortRequests(rids=[rid])
        return answer.count

    async_abort_request = awaitable(abort_request)

A definition yields what it asks for: a command; a `Sent` one; or a `Form`, to be given whichever of two suits. What
does more than ask the engine has its twin on a thread: `weight_sync.wire.cancellation.threaded`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Coroutine, Generator
from concurrent.futures import Future
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

from weight_sync.wire.cancellation import name_twin
from weight_sync.wire.futures import answer_of, wait

from .client import EngineClient

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S", bound=EngineClient)

Asking = Generator[Any, Any, R]
"""The definition of a call: it yields what it asks for, is sent the answers, and returns the call's result. Whatever
ends the wait for an answer, cancelling included, is raised where it was asked for."""


class Sent(NamedTuple):
    """A command that is under way."""

    future: Future[Any]
    """Its answer."""
    timeout_s: float
    """How long to wait for it."""
    what: str
    """What `DeadlineExceeded` calls it."""


class Form(NamedTuple):
    """One of two things, where a call and its twin need different ones."""

    call: Any
    twin: Any


def asks(define: Callable[Concatenate[S, P], Asking[R]]) -> Callable[Concatenate[S, P], R]:
    """The call that waits for each answer, for `timeout_s` seconds where `define` has such an argument, else for the
    engine's `request_timeout_s`. Raises what the engine answers, and `DeadlineExceeded`."""
    limit_of = _limit_of(define)

    @functools.wraps(define)
    def call(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        asking = define(self, *args, **kwargs)
        try:
            asked = next(asking)
            while True:
                try:
                    if isinstance(asked, Form):
                        answer = asked.call
                    elif isinstance(asked, Sent):
                        answer = wait(*asked)
                    else:
                        answer = self._call(asked, limit_of(self, *args, **kwargs))
                except BaseException as error:
                    asked = asking.throw(error)
                else:
                    asked = asking.send(answer)
        except StopIteration as end:
            result: R = end.value
            return result

    signature = inspect.signature(define)
    returned = str(signature.return_annotation).removeprefix("Asking[").removesuffix("]")
    call.__dict__["__signature__"] = signature.replace(return_annotation=returned)
    return call


def awaitable(
    call: Callable[Concatenate[S, P], R],
) -> Callable[Concatenate[S, P], Coroutine[Any, Any, R]]:
    """The twin of a call that `asks`, without a thread. Cancelling it gives up the answer, not what was asked."""
    define = definition_of(call)
    limit_of = _limit_of(define)

    @functools.wraps(call)
    async def twin(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        asking = define(self, *args, **kwargs)
        try:
            asked = next(asking)
            while True:
                try:
                    if isinstance(asked, Form):
                        answer = asked.twin
                    elif isinstance(asked, Sent):
                        answer = await answer_of(*asked)
                    else:
                        answer = await self._async_call(asked, limit_of(self, *args, **kwargs))
                except BaseException as error:
                    asked = asking.throw(error)
                else:
                    asked = asking.send(answer)
        except StopIteration as end:
            result: R = end.value
            return result

    named: Callable[Concatenate[S, P], Coroutine[Any, Any, R]] = name_twin(twin, call)
    return named


def definition_of(
    call: Callable[Concatenate[S, P], R],
) -> Callable[Concatenate[S, P], Asking[R]]:
    """What a call that `asks` is made from, for another definition to `yield from`."""
    return inspect.unwrap(call)


def _limit_of(define: Callable[..., Any]) -> Callable[..., float | None]:
    """What a call was given for its `timeout_s`."""
    signature = inspect.signature(define)
    if "timeout_s" not in signature.parameters:
        return lambda *args, **kwargs: None
    return lambda *args, **kwargs: signature.bind(*args, **kwargs).arguments.get("timeout_s")
