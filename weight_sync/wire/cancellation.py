"""Blocking calls for an event loop: on a thread of their own, and ended with the coroutine that waits for them.

A thread cannot be stopped from outside. So whoever cancels the coroutine says so to the `Deadline` of the call, which
ends its waits and refuses its next step; the coroutine ends when the call has, or has been told.
"""

import asyncio
import contextlib
import contextvars
import functools
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, Concatenate, ParamSpec, TypeVar

from ..devices.side_streams import as_here

P = ParamSpec("P")
S = TypeVar("S")
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

    On GPUs it works as from here: see `as_here`. Not on asyncio's own few threads, which others need while this one
    waits.
    """
    cancelled: Future[None] = Future()
    result: Future[T] = Future()
    context = contextvars.copy_context()
    context.run(_cancelled.set, cancelled)
    work_as_here = as_here()

    def run() -> None:
        try:
            work_as_here()
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


def threaded(
    call: Callable[Concatenate[S, P], T],
) -> Callable[Concatenate[S, P], Coroutine[Any, Any, T]]:
    """The `async_` twin of a method that blocks: the method (of a subclass, where that has its own) `on_a_thread`.

    async_publish = threaded(publish)
    """

    @functools.wraps(call)
    async def twin(self: S, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await on_a_thread(getattr(self, call.__name__), *args, **kwargs)

    named: Callable[Concatenate[S, P], Coroutine[Any, Any, T]] = name_twin(twin, call)
    return named


def name_twin(twin: Any, call: Any) -> Any:
    """`twin`, named and documented as the `async_` form of `call`, with its signature."""
    twin.__name__ = f"async_{call.__name__}"
    twin.__qualname__ = call.__qualname__.replace(call.__name__, twin.__name__)
    twin.__doc__ = f"As `{call.__name__}`, awaitable; cancelling it ends the call."
    return twin


def _look_at(ended: "asyncio.Future[Any]") -> None:
    """Nobody waits for how it ended, and asyncio would complain about that."""
    if not ended.cancelled():
        ended.exception()
