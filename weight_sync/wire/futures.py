"""Futures that several may end, of whom the first counts: an answer, a death, a caller who has given up."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Collection
from concurrent.futures import Future, InvalidStateError
from typing import Any, TypeVar

T = TypeVar("T")


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
