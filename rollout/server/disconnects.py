"""What is done for a client ends when the client goes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, Protocol, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .replies import HttpError

T = TypeVar("T")


class ClientGone(HttpError):
    """The client closed its connection; nobody reads the answer."""

    def __init__(self) -> None:
        super().__init__(499, "the client went away")


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client goes first. The body must have been read."""
    doing = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait((doing, watching), return_when=asyncio.FIRST_COMPLETED)
        if doing.done():
            return doing.result()
        raise ClientGone
    finally:
        await _end(doing, watching)


class Closable(Protocol):
    """What ends when it is closed; closing it twice is fine."""

    async def aclose(self) -> None: ...


class EventStream(Response):
    """Server-sent events from an asynchronous generator, which is closed when the client goes or does not read.

    source: what the events are made of; it is closed too, since a generator that was never begun closes nothing.
    slow_client_s: how long a client may leave what it was sent unread.
    """

    def __init__(
        self, events: AsyncGenerator[bytes, None], source: Closable, slow_client_s: float
    ) -> None:
        super().__init__(media_type="text/event-stream", headers={"cache-control": "no-cache"})
        del self.headers["content-length"]
        self._events = events
        self._source = source
        self._patience_s = slow_client_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self._send(send))
        watching = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait((sending, watching), return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            await _end(sending, watching)
            await self._events.aclose()
            await self._source.aclose()

    async def _send(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        async with asyncio.timeout(self._patience_s):
            await send(start)
        async for event in self._events:
            async with asyncio.timeout(self._patience_s):
                await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    for task in tasks:
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await task
