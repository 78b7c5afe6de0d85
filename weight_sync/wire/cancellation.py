"""Blocking calls for an event loop: on a thread of their own, and ended with the coroutine that waits for them.

A thread cannot be stopped from outside. So whoever cancels the coroutine says so to the `Deadline` of the call, which
ends its waits and refuses its next step; the coroutine ends when the call has, or has been told.
"""

import asyncio
import contextlib
import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_PATIENCE_S = 2.0
"""How long a cancelled coroutine waits for its call. One that is inside somebody else's code (an iterator) is left to
itself: what it holds has been ended, and its next step is refused."""

_cancelled: contextvars.ContextVar["Future[None] | None"] = contextvars.ContextVar(
    "cancelled", default=None
)


def current_cancellation() -> "Future[None] | None":
    """Done once the coroutine that this call runs for was cancelled; None: it runs for none."""
    return _cancelled.get()


async def on_a_thread(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """`call(...)` on a new thread; when the coroutine is cancelled, so is the call.

    Not on asyncio's own few threads, which others need while this one waits.
    """
    cancelled: Future[None] = Future()
    result: Future[T] = Future()
    context = contextvars.copy_context()
    context.run(_cancelled.set, cancelled)

    def run() -> None:
        try:
            result.set_result(context.run(call, *args, **kwargs))
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, name="rollout-call", daemon=True).start()
    ended = asyncio.wrap_future(result)
    try:
        return await asyncio.shield(ended)
    except asyncio.CancelledError:
        cancelled.set_result(None)
        with contextlib.suppress(BaseException):
            await asyncio.wait((ended,), timeout=_PATIENCE_S)
        ended.add_done_callback(_look_at)
        raise


def _look_at(ended: "asyncio.Future[Any]") -> None:
    """Nobody waits for how it ended, and asyncio would complain about that."""
    if not ended.cancelled():
        ended.exception()
