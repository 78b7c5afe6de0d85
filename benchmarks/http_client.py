"""A client of one connection that costs next to nothing, so that a measurement is of the server.

HTTP/1.1 on asyncio's streams, as far as `rollout serve` speaks it: answers with a length, or in chunks.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any, Self

import msgspec


class HttpConnection:
    """One connection that is used again and again; one request at a time."""

    def __init__(self, url: str) -> None:
        self._where = url.removeprefix("http://")
        host, _, port = self._where.rpartition(":")
        self._address = (host.strip("[]"), int(port))
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def __aenter__(self) -> Self:
        self._reader, self._writer = await asyncio.open_connection(*self._address, limit=1 << 24)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.vanish()

    def vanish(self) -> None:
        """Close the connection, whatever is under way."""
        if self._writer is not None:
            self._writer.transport.abort()
            self._writer = None

    async def post(self, path: str, body: Any) -> Any:
        """The JSON of an answer; `RuntimeError` for one that is not 200."""
        reader, length = await self._ask(path, body)
        if length is None:
            raise RuntimeError(f"{path}: got a stream, expected an answer with a length")
        return msgspec.json.decode(await reader.readexactly(length))

    async def events(self, path: str, body: Any) -> AsyncIterator[bytes]:
        """The data of server-sent events, up to the one that says that it was the last."""
        reader, length = await self._ask(path, body)
        if length is not None:
            raise RuntimeError(f"{path}: got an answer with a length, expected a stream")
        pending = b""
        while size := int(await reader.readline(), 16):
            pending += (await reader.readexactly(size + 2))[:-2]
            *events, pending = pending.split(b"\n\n")
            for event in events:
                if event != b"data: [DONE]":
                    yield event.removeprefix(b"data: ")
        await reader.readline()

    async def _ask(self, path: str, body: Any) -> tuple[asyncio.StreamReader, int | None]:
        reader, writer = self._reader, self._writer
        if reader is None or writer is None:
            raise RuntimeError("the connection is not open")
        content = msgspec.json.encode(body)
        head = (
            f"POST {path} HTTP/1.1\r\nHost: {self._where}\r\nContent-Length: {len(content)}\r\n\r\n"
        )
        writer.write(head.encode() + content)
        await writer.drain()
        lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower().split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines[1:] if ": " in line)
        length = int(headers["content-length"]) if "content-length" in headers else None
        if " 200" not in lines[0]:
            text = await reader.readexactly(length or 0)
            raise RuntimeError(f"{path}: got {lines[0]}: {text[:500]!r}")
        return reader, length
