"""Awaiting what blocks, without a thread of asyncio's pool: that has few, and other code of the caller's needs them."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, ParamSpec, TypeVar

from weight_sync.errors import DeadlineExceeded

from .executors.executor import no_answer

P = ParamSpec("P")
T = TypeVar("T")


async def on_own_thread(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """The result of a blocking call, which gets a thread of its own. Cancelling leaves it to end by itself."""
    future: Future[T] = Future()
    context = contextvars.copy_context()

    def run() -> None:
        try:
            result = context.run(call, *args, **kwargs)
        except BaseException as error:
            with contextlib.suppress(Exception):  # Nobody waits any more.
                future.set_exception(error)
        else:
            with contextlib.suppress(Exception):
                future.set_result(result)

    threading.Thread(target=run, name="rollout-call", daemon=True).start()
    return await asyncio.wrap_future(future)


async def answer_of(future: Future[Any], timeout_s: float, what: str) -> Any:
    """The result of a submitted command; `DeadlineExceeded` when the engine does not answer in time."""
    try:
        return await asyncio.wait_for(asyncio.wrap_future(future), timeout_s)
    except TimeoutError as error:
        if isinstance(error, DeadlineExceeded):
            raise
        raise no_answer(timeout_s, what) from None
