"""Calls from any thread, worked off in their order by one thread, which is not deaf while it waits for a trainer."""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

from ..errors import DeadlineExceeded, EngineDiedError
from .messages import (
    Abort,
    Begin,
    CloseArena,
    GetFingerprint,
    GetIgnored,
    Hello,
    JoinGroup,
    LeaveGroup,
    OpenArena,
)
from .rpc_wire import REFUSALS, Call, typed

logger = logging.getLogger(__name__)

MEANWHILE = (
    *(Hello, GetIgnored, GetFingerprint, OpenArena, CloseArena),
    *(JoinGroup, LeaveGroup, Begin, Abort),
)
"""Messages that need not wait until the bytes of a session have come; the others belong to that session."""
_CLOSING_S = 30.0


class CallQueue:
    """Answers every call on a thread of its own with what `serve(call)` returns (later, if it is a future) or raises.

    A call whose deadline has passed before its turn is not carried out: its caller has given up, and must not be
    surprised by a commit; `missed(message, error)` hears of it. When nothing has come for `pause()` seconds (None: for
    however long), `idle()` is run there. `end()` is the last thing that the thread runs.
    """

    def __init__(
        self,
        name: str,
        *,
        serve: Callable[[Call], Any],
        missed: Callable[[Any, DeadlineExceeded], None] = lambda message, error: None,
        pause: Callable[[], float | None],
        idle: Callable[[], None],
        end: Callable[[], None],
        begin: Callable[[], None] = lambda: None,
        what: str = "engine",
    ) -> None:
        """`begin()` is the first thing that the thread runs. `what` was shut down, says the error after the end."""
        self._what = what
        self._serve = serve
        self._missed = missed
        self._pause = pause
        self._idle = idle
        self._end = end
        self._begin = begin
        self._calls: deque[Call] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, call: Call) -> None:
        """Queue a call, or fail it after the end; any thread."""
        with self._changed:
            if not self._closing:
                self._calls.append(call)
                self._changed.notify_all()
                return
        call.fail(self._shut_down())

    def wait(self, future: "Future[Any]", timeout_s: float = math.inf) -> Any:
        """On the thread of the queue, inside `serve`: the result of `future`, serving `MEANWHILE` until it is there.

        Raises `TimeoutError` after `timeout_s`, as futures do, and `EngineDiedError` when the queue is closed.
        """
        future.add_done_callback(lambda _: self._notify())
        end = time.monotonic() + timeout_s
        while not future.done() and self._work(MEANWHILE, future.done, end):
            pass
        if self._closing and not future.done():
            raise self._shut_down()
        return future.result(0.0)

    def next_is(self, wanted: Callable[[Any], bool]) -> bool:
        """Whether a call waits, and the body of the first one is `wanted`; on the thread of the queue."""
        with self._changed:
            return bool(self._calls) and wanted(self._calls[0].body)

    def close(self) -> None:
        """End the thread after the call that it serves, and fail what is queued. Safe to repeat."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=_CLOSING_S)

    def _run(self) -> None:
        self._begin()
        while self._work(None, lambda: False, math.inf):
            pass
        try:
            self._end()
        finally:
            while self._calls:
                self._calls.popleft().fail(self._shut_down())

    def _work(self, kinds: tuple[type, ...] | None, done: Callable[[], bool], end: float) -> bool:
        """Serve one call of these kinds, or be idle for once; False when `done`, late or closing."""
        call: Call | None = None

        def ready() -> bool:
            nonlocal call
            call = next(
                (c for c in self._calls if kinds is None or isinstance(c.body, kinds)), None
            )
            return call is not None or self._closing or done()

        left_s, pause_s = end - time.monotonic(), self._pause()
        waits_s = min(left_s, math.inf if pause_s is None else pause_s)
        with self._changed:
            woken = self._changed.wait_for(
                ready, None if math.isinf(waits_s) else max(0.0, waits_s)
            )
            if self._closing or done() or (not woken and left_s <= waits_s):
                return False
            if call is not None:
                self._calls.remove(call)
        if call is None:
            try:
                self._idle()
            except Exception:  # as with a call: the thread goes on
                logger.exception("the %s could not look after what it holds", self._what)
        else:
            self._answer(call)
        return True

    def _answer(self, call: Call) -> None:
        body = call.body
        try:
            if call.deadline <= time.monotonic():
                late = DeadlineExceeded(
                    f"{type(body).__name__} waited too long for its turn and was not carried out"
                )
                self._missed(body, late)
                raise late
            answer = self._serve(call)
            if isinstance(answer, Future):
                answer.add_done_callback(partial(answer_later, call))
            else:
                call.reply(answer)
        except Exception as error:  # whatever it was, the thread goes on and the caller is told
            if not isinstance(error, REFUSALS):
                logger.exception("%s failed", type(body).__name__)
            call.fail(typed(error, type(body).__name__))

    def _shut_down(self) -> EngineDiedError:
        return EngineDiedError(f"the {self._what} was shut down; start a new one and connect again")

    @property
    def closed(self) -> bool:
        """It takes no more calls."""
        return self._closing

    @property
    def ended(self) -> bool:
        """Its thread runs no handler any more, nor ever will."""
        return self._closing and not self._thread.is_alive()

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()


def answer_later(call: Call, future: "Future[Any]") -> None:
    """Answer a call with what a future that is done has."""
    error = future.exception()
    if error is None:
        call.reply(future.result())
    else:
        call.fail(typed(error, type(call.body).__name__))
