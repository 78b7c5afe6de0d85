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

from ..errors import DeadlineExceeded, ProtocolError, SyncError
from .connections import BACKLOG, ConnectionLimit
from .keys import Address, Gate, is_on_this_machine, shown
from .listening import listen
from .messages import Bucket, ErrorReply, Receive
from .process import Home
from .rpc_wire import (
    CLOCK_ID,
    MAX_MESSAGE_BYTES,
    PROTOCOL_VERSION,
    UNREADABLE,
    Call,
    ReplyHeader,
    RequestHeader,
    WakeUp,
    check_size,
    error_reply,
    watch_peer,
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
        if header.deadline is not None:
            self.deadline = min(self.deadline, header.deadline)

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
    is dropped; what is read after its deadline is answered with `DeadlineExceeded` and goes no further. None of it ever
    ends the server, nor does a handler that raises. Should the I/O thread fail all the same, `on_failure` is told why,
    on that thread: nobody can reach the server any more.

    `bind`: None makes a socket file in a private folder, removed by `close()`; "tcp://127.0.0.1:0" lets the system
    choose a port. `AddressInUseError` where another server listens. `address` is known when the constructor returns;
    calls are served after `start()`. While too many clients are connected, no others are let in.

    What other users or machines can reach is guarded: a socket file's folder must be this user's alone, else it is an
    `InsecureAddressError`; beyond this machine only those connect who have the key that `address` then has. With
    "?key_file=PATH" behind a TCP address the keys are those in that file, also on this machine. `insecure`: no keys.
    """

    def __init__(
        self,
        handler: Callable[[Call], None],
        request_type: Any,
        *,
        bind: str | None = None,
        insecure: bool = False,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        name: str = "rpc",
        on_failure: Callable[[Exception], None] | None = None,
    ) -> None:
        self._home = Home("a server")
        self._on_failure = on_failure
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
        self._connections: ConnectionLimit | None = None
        self._gate: Gate | None = None
        try:
            place = Address.of_server(bind or f"ipc://{os.path.join(str(self._folder), 'socket')}")
            self._configure(place.endpoint)
            if insecure and not is_on_this_machine(place.endpoint):
                logger.warning("anybody who reaches %s can do everything: insecure", place.endpoint)
            keys = place.server_keys(insecure)
            if keys is not None:
                self._gate = Gate(self._context, self._socket, keys)
            self.address = listen(self._socket, place.endpoint, insecure=insecure)
            self._connections = ConnectionLimit(self._socket, self.address)
            if keys is not None:
                self.address = f"{self.address}?key={keys.key}"
        except BaseException:
            self._release()
            raise

    def start(self) -> None:
        """Serve, on a thread of its own."""
        self._thread.start()

    def close(self) -> None:
        """Send what was answered, stop, and remove the socket file. Safe to repeat; in a forked child, nothing."""
        if self._closing or not self._home.here:
            return
        self._closing = True
        self._wake.set()
        if self._thread.ident is None:
            self._release()
        elif self._thread is not threading.current_thread():
            self._thread.join(timeout=10.0)

    def _configure(self, address: str) -> None:
        socket = self._socket
        socket.setsockopt(zmq.LINGER, 500)  # the last reply, often "shut down", still gets out
        socket.setsockopt(zmq.MAXMSGSIZE, self._max_bytes)
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        # Replies wait in memory for a slow reader: their number is bounded by the calls that it made.
        socket.setsockopt(zmq.SNDHWM, 0)
        socket.setsockopt(zmq.BACKLOG, BACKLOG)
        watch_peer(socket, address)

    def _send(self, to: bytes, call_id: int, kind: Any, body: Any) -> None:
        """Queue a reply; any thread. A reply that cannot be sent becomes an error that can."""
        try:
            frame = check_size(self._encode(body), self._max_bytes, "the reply")
        except (ProtocolError, msgspec.MsgspecError, TypeError, OverflowError) as error:
            logger.error("reply %s cannot be sent: %s", type(body).__name__, error)
            kind = "error"
            reply = ErrorReply(code=ProtocolError.__name__, message=f"reply not sent: {error}")
            frame = self._encode(reply)
        self._enqueue(to, call_id, kind, frame)

    def _enqueue(self, to: bytes, call_id: int, kind: Any, frame: bytes) -> None:
        clock = time.monotonic()
        header = ReplyHeader(protocol=PROTOCOL_VERSION, id=call_id, kind=kind, clock=clock)
        self._outbox.append((to, self._encode(header), frame))
        self._wake.set()

    def _run(self) -> None:
        assert self._connections is not None
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._connections.monitor, zmq.POLLIN)
        poller.register(self._wake.fileno(), zmq.POLLIN)
        if self._gate is not None:
            poller.register(self._gate.socket, zmq.POLLIN)
        try:
            while not self._closing:
                poller.poll(self._connections.patience_ms)
                self._wake.clear()
                self._connections.look()
                if self._gate is not None:
                    self._gate.answer()
                self._flush()
                self._receive()
            self._flush()
            # A socket that closes right after a send may lose what it has accepted, whatever LINGER says.
            left_s = self._last_sent + _LAST_WORD_S - time.monotonic()
            if left_s > 0:
                time.sleep(left_s)
        except Exception as error:  # a server that nobody can reach must not go unnoticed
            logger.critical(
                "the server at %s can serve nobody any more", shown(self.address), exc_info=True
            )
            if self._on_failure is not None:
                self._on_failure(error)
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
            if header.id == CLOCK_ID:
                self._enqueue(frames[0], CLOCK_ID, "clock", b"")
                return
            call.body = self._body_decoder.decode(frames[2])
            if not isinstance(call.body, Bucket | Receive):
                _check_in_time(
                    call
                )  # those may have bytes under way: the receiver sees to that, and refuses them
        except (ProtocolError, DeadlineExceeded, MemoryError) as error:
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
        if self._connections is not None:
            self._connections.close()
        if self._gate is not None:
            self._gate.close()
        self._socket.close()
        self._context.term()
        self._wake.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def _check_in_time(call: ServerCall) -> None:
    late_s = time.monotonic() - call.deadline
    if late_s >= 0:
        raise DeadlineExceeded(
            f"{type(call.body).__name__} was read {late_s:.3f} s after its deadline and was not carried out; raise the "
            "timeout, or look at what kept this process from reading"
        )


def private_folder() -> str:
    """A new folder that only this user can enter; a socket's whole path may have 107 characters."""
    folder = tempfile.gettempdir()
    return tempfile.mkdtemp(prefix="rollout-", dir=folder if len(folder) < 80 else "/tmp")
