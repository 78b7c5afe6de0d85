"""The thread that serves an engine's weights outlives whatever goes wrong on it."""

from __future__ import annotations

import math
import threading
from typing import Any

from weight_sync.errors import EngineDiedError
from weight_sync.wire.call_queue import CallQueue
from weight_sync.wire.local_call import LocalCall


def test_what_fails_while_nobody_calls_does_not_end_the_thread() -> None:
    failed = threading.Event()

    def idle() -> None:
        failed.set()
        raise RuntimeError("an allocation could not be closed")

    queue = CallQueue(
        "test",
        serve=lambda call: "served",
        pause=lambda: 0.001,
        idle=idle,
        end=lambda: None,
    )
    assert failed.wait(60)
    call = LocalCall("a question", math.inf)
    queue.put(call)
    assert call.future.result(60) == "served"
    queue.close()


def test_an_end_that_fails_still_answers_what_is_queued() -> None:
    serving, go_on = threading.Event(), threading.Event()

    def serve(call: Any) -> None:
        serving.set()
        assert go_on.wait(60)

    def end() -> None:
        raise RuntimeError("the end broke on purpose")

    threading.excepthook, before = lambda _: None, threading.excepthook
    try:
        queue = CallQueue("test", serve=serve, pause=lambda: None, idle=lambda: None, end=end)
        first, second = (LocalCall(name, math.inf) for name in ("first", "second"))
        queue.put(first)
        assert serving.wait(60)
        queue.put(second)
        closing = threading.Thread(target=queue.close)
        closing.start()
        while not queue.closed:
            pass
        go_on.set()
        assert isinstance(second.future.exception(5), EngineDiedError)
        closing.join(60)
    finally:
        threading.excepthook = before
