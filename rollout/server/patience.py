"""How long a connection may stay open for a client that owes it something, and how large a request's head may be.

uvicorn waits for ever for the first byte, and for a head, of any length, that comes one byte at a time; and once it has
answered before a body had come (no key, too large) it goes on taking that body. None of these clients has shown a key.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 64 << 10
"""Bytes of a request's line and headers, beyond those of the first read."""
LINGER_S = 2.0
"""How long a client that was answered early may go on sending: closed at once, it might not see the answer."""
_REPLY = b"HTTP/1.1 %s\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


class PatientProtocol(HttpToolsProtocol):
    """One connection; `patience_s` is for the first byte after connecting, and for each head from its first byte on."""

    patience_s = 60.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._is_fresh = True  # Nothing has come yet.
        self._in_head = self._in_message = False
        self._num_head_bytes = 0
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Called by the loop."""
        super().connection_made(transport)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the loop."""
        self._unwatch()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Called by the loop."""
        was_in_head = self._in_head
        super().data_received(data)
        if self.transport.is_closing():
            return
        if was_in_head and self._in_head:
            self._num_head_bytes += len(data)
            if self._num_head_bytes > MAX_HEAD_BYTES:
                self._end(b"431 Request Header Fields Too Large")
                return
        self._watch()

    def on_message_begin(self) -> None:
        """Called by the parser, as those below."""
        super().on_message_begin()
        self._is_fresh = False
        self._in_head = self._in_message = True
        self._num_head_bytes = 0

    def on_headers_complete(self) -> None:
        self._in_head = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._in_message = False
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._unwatch()
        self._watch()

    def _watch(self) -> None:
        """Set the clock where the client owes something and no route waits for it; those have clocks of their own."""
        is_answering = self.cycle is not None and not self.cycle.response_complete
        if is_answering or not (self._is_fresh or self._in_message):
            self._unwatch()
        elif self._timer is None:
            was_answered = self._in_message and not self._in_head
            seconds = min(LINGER_S, self.patience_s) if was_answered else self.patience_s
            self._timer = self.loop.call_later(seconds, self._is_late)

    def _unwatch(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _is_late(self) -> None:
        self._timer = None
        self._end(b"408 Request Timeout" if self._in_head else None)

    def _end(self, status: bytes | None) -> None:
        if self.transport.is_closing():
            return
        if status is not None:
            self.transport.write(_REPLY % status)
        self.transport.close()


def patient_protocol(patience_s: float) -> type[PatientProtocol]:
    """The protocol for a server whose clients may leave it waiting for so many seconds."""
    return type("PatientProtocol", (PatientProtocol,), {"patience_s": patience_s})
