"""The serving end of `rpc`: one ROUTER socket, one I/O thread, replies from any thread."""

import logging
import os
import shutil
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec
import zmq

from ..errors import ProtocolError, SyncError
from .messages import ErrorReply
from .rpc_wire import (
    HEARTBEAT_INTERVAL_MS,
    HEARTBEAT_TIMEOUT_MS,
    MAX_MESSAGE_BYTES,
    PROTOCOL_VERSION,
    UNREADABLE,
    Call,
    ReplyHeader,
    RequestHeader,
    WakeUp,
    check_size,
    error_reply,
)

logger = logging.getLogger(__name__)

_RECEIVE_BURST = 64
"""Requests read before replies are sent again, so that neither direction starves."""
_LAST_WORD_S = 0.05
"""How long the socket stays open after the last reply."""


class ServerCall:
    """`Call` over a connection."""

    __slots__ = ("_answered", "_id", "_lock", "_server", "_to", "body", "deadline")

    def __init__(
        self, server: "RpcServer", to: bytes, header: RequestHeader, body: Any = None
    ) -> None:
        self._server = server
        self._to = to
        self._id = header.id
        self._answered = False
        self._lock = threading.Lock()
        self.body = body
        self.deadline = time.monotonic() + header.timeout_s

    @property
    def peer(self) -> str:
        return self._to.hex()

    def reply(self, body: Any) -> None:
        self._answer("reply", body)

    def stream(self, body: Any) -> None:
        with self._lock:  # held while queueing, so that no chunk follows the answer
            if not self._answered:
                self._server._send(self._to, self._id, "chunk", body)

    def fail(self, error: BaseException) -> None:
        self._answer("error", error_reply(error))

    def _answer(self, kind: str, body: Any) -> None:
        with self._lock:
            if not self._answered:
                self._server._send(self._to, self._id, kind, body)
                self._answered = True


class RpcServer:
    """Answers calls of the types in `request_type`, a union of tagged structs.

    `handler(call)` runs on the I/O thread and must not block; it hands long work to another thread, which answers. What
    cannot be decoded is answered with a `ProtocolError` that names the field; what does not even have a readable header
    is dropped. Neither ever ends the server, nor does a handler that raises.

    `bind`: None makes a socket file in a private folder, removed by `close()`; "tcp://127.0.0.1:0" lets the system
    choose a port. `address` is known when the constructor returns; calls are served after `start()`.
    """

    def __init__(
        self,
        handler: Callable[[Call], None],
        request_type: Any,
        *,
        bind: str | None = None,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        name: str = "rpc",
    ) -> None:
        self._handler = handler
        self._max_bytes = max_message_bytes
        self._header_decoder = msgspec.msgpack.Decoder(RequestHeader)
        self._body_decoder = msgspec.msgpack.Decoder(request_type)
        self._encode = msgspec.msgpack.encode
        self._outbox: deque[tuple[bytes, bytes, bytes]] = deque()
        self._closing = False
        self._last_sent = -_LAST_WORD_S
        self._folder = private_folder() if bind is None else None
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._wake = WakeUp()
        self._thread = threading.Thread(target=self._run, name=f"{name}-server", daemon=True)
        try:
            self._configure()
            self._socket.bind(bind or f"ipc://{os.path.join(str(self._folder), 'socket')}")
        except BaseException:
            self._release()
            raise
        self.address: str = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def start(self) -> None:
        """Serve, on a thread of its own."""
        self._thread.start()

    def close(self) -> None:
        """Send what was answered, stop, and remove the socket file. Safe to repeat."""
        if self._closing:
            return
        self._closing = True
        self._wake.set()
        if self._thread.ident is None:
            self._release()
        elif self._thread is not threading.current_thread():
            self._thread.join(timeout=10.0)

    def _configure(self) -> None:
        socket = self._socket
        socket.setsockopt(zmq.LINGER, 500)  # the last reply, often "shut down", still gets out
        socket.setsockopt(zmq.MAXMSGSIZE, self._max_bytes)
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        # Replies wait in memory for a slow reader: their number is bounded by the calls that it made.
        socket.setsockopt(zmq.SNDHWM, 0)
        socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_INTERVAL_MS)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)

    def _send(self, to: bytes, call_id: int, kind: Any, body: Any) -> None:
        """Queue a reply; any thread. A reply that cannot be sent becomes an error that can."""
        try:
            frame = check_size(self._encode(body), self._max_bytes, "the reply")
        except (ProtocolError, msgspec.MsgspecError, TypeError, OverflowError) as error:
            logger.error("reply %s cannot be sent: %s", type(body).__name__, error)
            kind = "error"
            reply = ErrorReply(code=ProtocolError.__name__, message=f"reply not sent: {error}")
            frame = self._encode(reply)
        header = ReplyHeader(protocol=PROTOCOL_VERSION, id=call_id, kind=kind)
        self._outbox.append((to, self._encode(header), frame))
        self._wake.set()

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._wake.fileno(), zmq.POLLIN)
        try:
            while not self._closing:
                poller.poll()
                self._wake.clear()
                self._flush()
                self._receive()
            self._flush()
            # A socket that closes right after a send may lose what it has accepted, whatever LINGER says.
            left_s = self._last_sent + _LAST_WORD_S - time.monotonic()
            if left_s > 0:
                time.sleep(left_s)
        finally:
            self._release()

    def _flush(self) -> None:
        while self._outbox:
            frames = self._outbox.popleft()
            try:
                self._socket.send_multipart(frames, zmq.NOBLOCK)
                self._last_sent = time.monotonic()
            except zmq.ZMQError as error:  # the caller has gone; its reply reaches nobody
                logger.debug("dropped a reply: %s", error)

    def _receive(self) -> None:
        for _ in range(_RECEIVE_BURST):
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            except zmq.ZMQError as error:
                logger.warning("could not receive: %s", error)
                return
            self._dispatch(frames)
        self._wake.set()  # there may be more: poll again at once

    def _dispatch(self, frames: list[bytes]) -> None:
        try:
            header = self._header_decoder.decode(frames[1])
        except (IndexError, *UNREADABLE) as error:
            logger.debug("dropped %d frames without a readable header: %s", len(frames), error)
            return
        call = ServerCall(self, frames[0], header)
        try:
            self._check(header, frames)
            call.body = self._body_decoder.decode(frames[2])
        except ProtocolError as error:
            call.fail(error)
            return
        except UNREADABLE as error:
            call.fail(
                ProtocolError(
                    f"the message cannot be understood: {error}; expected one of the messages of "
                    f"protocol {PROTOCOL_VERSION}; check that both sides run the same release"
                )
            )
            return
        try:
            self._handler(call)
        except (SyncError, ValueError) as error:  # a refusal
            call.fail(error)
        except Exception as error:  # a handler's bug must not end the service of everyone else
            logger.exception("the handler of %s failed", type(call.body).__name__)
            call.fail(error)

    def _check(self, header: RequestHeader, frames: list[bytes]) -> None:
        if header.protocol != PROTOCOL_VERSION:
            raise ProtocolError(
                f"protocol versions differ: got {header.protocol}, expected {PROTOCOL_VERSION}; "
                "install the same release of rollout-sync on both sides"
            )
        if len(frames) != 3:
            raise ProtocolError(
                f"a call has a header and a body: got {len(frames) - 1} frames, expected 2; "
                "use weight_sync.wire.rpc.RpcClient"
            )

    def _release(self) -> None:
        self._closing = True
        self._socket.close()
        self._context.term()
        self._wake.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def private_folder() -> str:
    """A new folder that only this user can enter; a socket's whole path may have 107 characters."""
    folder = tempfile.gettempdir()
    return tempfile.mkdtemp(prefix="rollout-", dir=folder if len(folder) < 80 else "/tmp")
