"""Futures of answers: waited for with a limit, and ended by whoever is first: an answer, a death, who has given up."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, InvalidStateError
from typing import Any, TypeVar

from ..errors import DeadlineExceeded

T = TypeVar("T")


def no_answer(timeout_s: float, what: str) -> DeadlineExceeded:
    """The error of a call that was not answered."""
    return DeadlineExceeded(
        f"{what}: no answer within {timeout_s:.3g} s, and what comes later is dropped; the engine is busy or hangs; "
        "raise the timeout, or shut it down"
    )


def wait(future: Future[Any], timeout_s: float, what: str) -> Any:
    """What `future` has; `no_answer` when that does not come in time."""
    with _in_time(timeout_s, what):
        return future.result(timeout_s)


async def answer_of(future: Future[Any], timeout_s: float, what: str) -> Any:
    """As `wait`, awaitable."""
    with _in_time(timeout_s, what):
        # Not `wait_for`: Python 3.11's loses a cancellation that comes together with the answer.
        async with asyncio.timeout(timeout_s):
            return await asyncio.wrap_future(future)


@contextlib.contextmanager
def _in_time(timeout_s: float, what: str) -> Iterator[None]:
    """Whatever the call itself raised goes on, its own deadline too."""
    try:
        yield
    except TimeoutError as error:
        if isinstance(error, DeadlineExceeded):
            raise
        raise no_answer(timeout_s, what) from None


def answer(future: Future[T], result: T) -> None:
    """End it with `result`; nothing happens if it has ended."""
    with contextlib.suppress(InvalidStateError):
        future.set_result(result)


def fail(future: Future[Any], error: BaseException) -> None:
    """End it with `error`; nothing happens if it has ended."""
    with contextlib.suppress(InvalidStateError):
        future.set_exception(error)


def resolve(future: Future[T], function: Callable[[], T]) -> None:
    """End it with what `function` returns or raises; nothing happens if it has ended meanwhile."""
    try:
        result = function()
    except Exception as error:
        fail(future, error)
    else:
        answer(future, result)


def when_all_are_done(futures: Collection[Future[Any]], then: Callable[[], None]) -> None:
    """Call `then()` once these are done: on the thread that ends the last of them, or at once."""
    missing, lock = len(futures), threading.Lock()

    def note(_: Future[Any]) -> None:
        nonlocal missing
        with lock:
            missing -= 1
            last = missing == 0
        if last:
            then()

    for future in futures:
        future.add_done_callback(note)
    if not futures:
        then()
