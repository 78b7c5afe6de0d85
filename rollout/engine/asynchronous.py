"""Awaiting what an engine answers."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from typing import Any

from weight_sync.errors import DeadlineExceeded

from .executors.executor import no_answer


async def answer_of(future: Future[Any], timeout_s: float, what: str) -> Any:
    """The result of a submitted command; `DeadlineExceeded` when the engine does not answer in time."""
    try:
        return await asyncio.wait_for(asyncio.wrap_future(future), timeout_s)
    except TimeoutError as error:
        if isinstance(error, DeadlineExceeded):
            raise
        raise no_answer(timeout_s, what) from None
