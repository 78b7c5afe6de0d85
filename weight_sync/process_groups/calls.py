"""Blocking calls on a thread of their own, with deadlines that hold even when a call never returns."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from ..errors import DeadlineExceeded, TransportError

T = TypeVar("T")

GRACE_S = 0.25
"""How long a call that minds its deadline or its peers itself may take to raise its own, better error."""
_WATCH_S = 0.1


class _Task:
    """One call and what became of it."""

    __slots__ = ("call", "end", "future", "timeout_s", "what")

    def __init__(self, call: Callable[[], Any], timeout_s: float, what: str) -> None:
        self.call = call
        self.timeout_s = timeout_s
        self.what = what
        self.end = time.monotonic() + timeout_s
        self.future: Future[Any] = Future()
        self.future.set_running_or_notify_cancel()

    def resolve(self, result: Any = None, error: BaseException | None = None) -> None:
        """The first answer counts; called with the lock of the thread held."""
        if self.future.done():
            return
        if error is not None:
            self.future.set_exception(error)
        else:
            self.future.set_result(result)


class CallThread:
    """Runs calls one after another, in the order in which they were submitted.

    A call that outlives its deadline cannot be interrupted, only left behind: its future fails with
    `DeadlineExceeded`, `on_overrun` may abort what the call waits for, every later call fails at once, and the thread
    ends when the call returns. The same, with `TransportError`, when `watch` says while a call runs why it will never
    return. `on_end` is the last thing that the thread runs. A call may submit, but not wait.
    """

    def __init__(
        self,
        name: str,
        *,
        watch: Callable[[], str | None] | None = None,
        on_overrun: Callable[[], None] | None = None,
        on_end: Callable[[], None] | None = None,
    ) -> None:
        self._watch = watch
        self._on_overrun = on_overrun
        self._on_end = on_end
        self._changed = threading.Condition()
        self._tasks: deque[_Task] = deque()
        self._current: _Task | None = None
        self._over: str | None = None
        self._worker = threading.Thread(target=self._work, name=f"{name}-calls", daemon=True)
        self._guard = threading.Thread(
            target=self._guard_calls, name=f"{name}-deadlines", daemon=True
        )
        self._worker.start()
        self._guard.start()

    @property
    def over(self) -> bool:
        """Whether nobody waits for the running call any more; calls that poll should end when it turns true."""
        return self._over is not None

    @property
    def idle(self) -> bool:
        """Whether no call runs or waits."""
        with self._changed:
            return not self._pending()

    def submit(self, call: Callable[[], T], *, timeout_s: float, what: str) -> Future[T]:
        """Run `call` after those before it; `what` names it in errors."""
        task = _Task(call, timeout_s, what)
        with self._changed:
            if self._over is not None:
                task.resolve(error=_unanswered(task, self._over))
            else:
                self._tasks.append(task)
                self._changed.notify_all()
        return task.future

    def run(self, call: Callable[[], T], *, timeout_s: float, what: str) -> T:
        """`submit`, and wait for the result."""
        return self.submit(call, timeout_s=timeout_s, what=what).result()

    def close(self, *, wait_s: float = 1.0) -> bool:
        """Fail what is queued or running and end the thread; whether it has ended within `wait_s`.

        Never blocks for longer: a thread that is stuck in a call ends after it, whenever that is. Safe to repeat.
        """
        self.let_go()
        self._guard.join()
        self._worker.join(timeout=wait_s)
        return not self._worker.is_alive()

    def join(self, timeout_s: float | None = None) -> bool:
        """After `close`: until the thread has ended, and nothing of its calls runs any more; whether it has in time."""
        self._worker.join(timeout_s)
        return not self._worker.is_alive()

    def let_go(self) -> None:
        """`close` for an owner that was collected: waits for nothing, on whatever thread."""
        with self._changed:
            self._end("it was closed")

    def _pending(self) -> list[_Task]:
        return [*([self._current] if self._current is not None else []), *self._tasks]

    def _end(self, why: str) -> None:
        """With the lock held: accept nothing more, and fail what waits."""
        self._over = self._over or why
        for task in self._pending():
            task.resolve(error=_unanswered(task, self._over))
        self._tasks.clear()
        self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._tasks or self._over is not None)
                if self._over is not None:
                    break
                task = self._current = self._tasks.popleft()
            result: Any = None
            error: BaseException | None = None
            try:
                result = task.call()
            except (
                BaseException
            ) as caught:  # whatever it is, it belongs to whoever waits for the future
                error = caught
            del task.call  # whoever hears that it is done is alone with its buffers
            with self._changed:
                self._current = None
                task.resolve(result, error)
                self._changed.notify_all()
            del task, result, error  # or they would keep buffers alive until the next call
        if self._on_end is not None:
            self._on_end()

    def _guard_calls(self) -> None:
        lost_since: float | None = None
        with self._changed:
            while self._over is None:
                now = time.monotonic()
                late = min(self._pending(), key=lambda task: task.end, default=None)
                if late is not None and late.end + GRACE_S <= now:
                    late.resolve(error=_overran(late))
                    if late is not self._current:
                        self._tasks.remove(late)
                        continue
                    self._end(f"the call before it ({late.what}) did not end by its deadline")
                    break
                reason = self._watch() if self._watch is not None and self._current else None
                lost_since = None if reason is None else lost_since or now
                if reason is not None and lost_since is not None and lost_since + GRACE_S <= now:
                    self._end(reason)
                    break
                self._changed.wait(self._nap_s(late, now))
            else:
                return
        if self._on_overrun is not None:
            self._on_overrun()

    def _nap_s(self, next_late: _Task | None, now: float) -> float | None:
        if next_late is None:
            return None
        until_late_s = next_late.end + GRACE_S - now
        return until_late_s if self._watch is None else min(until_late_s, _WATCH_S)


def _overran(task: _Task) -> DeadlineExceeded:
    return DeadlineExceeded(
        f"{task.what}: got no result within {task.timeout_s:.1f} s, expected every member to take part in time; "
        "look for one that is late, stopped or dead, or raise the timeout"
    )


def _unanswered(task: _Task, why: str) -> TransportError:
    return TransportError(
        f"{task.what}: got no result because {why}, expected an open group; make a new one"
    )
