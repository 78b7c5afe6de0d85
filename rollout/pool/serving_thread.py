"""A thread that answers calls one after another, and does other things between two of them."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial
from typing import Any

from weight_sync.errors import DeadlineExceeded, EngineDiedError, ProtocolError, SyncError
from weight_sync.wire.rpc import Call

logger = logging.getLogger(__name__)


class ServingThread:
    """Serves calls with `actions`: type of the body -> function of (body, deadline).

    A function that returns a `Future` has its call answered when that is done; meanwhile other calls go on.
    """

    def __init__(self, actions: Mapping[type, Callable[[Any, float], Any]], *, name: str) -> None:
        self._actions = actions
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.closed = False
        """It takes no more calls."""
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def handle(self, call: Call) -> None:
        """Queue a call; returns at once."""
        if self.closed:
            call.fail(EngineDiedError("the pool was shut down; connect to a new one"))
        else:
            self._queue.put(lambda: self._serve(call))

    def do(self, action: Callable[[], None]) -> Future[None]:
        """Run `action` between two calls."""
        future: Future[None] = Future()

        def run() -> None:
            try:
                action()
            except Exception as error:
                future.set_exception(error)
            else:
                future.set_result(None)

        self._queue.put(run)
        return future

    def close(self) -> None:
        """Stop; what is queued is dropped. Safe to repeat."""
        if not self.closed:
            self.closed = True
            self._queue.put(None)
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=30.0)

    def _run(self) -> None:
        while (action := self._queue.get()) is not None:
            action()

    def _serve(self, call: Call) -> None:
        body = call.body
        try:
            if call.deadline <= time.monotonic():
                raise DeadlineExceeded(
                    f"{type(body).__name__} waited too long for its turn and was not carried out"
                )
            action = self._actions.get(type(body))
            if action is None:
                raise ProtocolError(f"not a message about weights: got {type(body).__name__}")
            answer = action(body, call.deadline)
            if isinstance(answer, Future):
                answer.add_done_callback(partial(_answer_later, call))
            else:
                call.reply(answer)
        except (SyncError, ValueError) as error:  # a refusal
            call.fail(error)
        except Exception as error:  # whatever it was, the pool goes on and the caller is told
            logger.exception("%s failed", type(body).__name__)
            call.fail(error)


def _answer_later(call: Call, future: Future[Any]) -> None:
    error = future.exception()
    if error is None:
        call.reply(future.result())
    else:
        call.fail(error)
