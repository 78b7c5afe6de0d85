"""The calling end of `rpc`: one connection, one I/O thread, calls from any thread."""

import heapq
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

import msgspec
import zmq
from zmq.utils.monitor import recv_monitor_message

from ..errors import DeadlineExceeded, EngineDiedError, ProtocolError
from .messages import ErrorReply
from .rpc_wire import (
    HEARTBEAT_INTERVAL_MS,
    HEARTBEAT_TIMEOUT_MS,
    MAX_MESSAGE_BYTES,
    PROTOCOL_VERSION,
    UNREADABLE,
    ReplyHeader,
    RequestHeader,
    WakeUp,
    check_size,
    check_timeout,
    raised,
)

logger = logging.getLogger(__name__)

_LIVENESS_INTERVAL_S = 0.2
_CONNECT_RETRY_S = 0.02
_LAST_MOMENTS_S = 2.0
"""How long a process that has closed its connection may take to be gone; one that dumps its memory takes a while."""
_LOST = zmq.EVENT_DISCONNECTED
_FAILED = (
    zmq.EVENT_CLOSED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)


class _Pending:
    """A call that was not answered yet."""

    __slots__ = ("deadline", "future", "on_chunk", "timeout_s", "what")

    def __init__(self, what: str, timeout_s: float, on_chunk: Callable[[Any], None] | None) -> None:
        self.what = what
        self.timeout_s = timeout_s
        self.deadline = time.monotonic() + timeout_s
        self.on_chunk = on_chunk
        self.future: Future[Any] = Future()

    def resolve(self, result: Any = None, error: BaseException | None = None) -> None:
        """Answer, unless the caller cancelled."""
        if not self.future.set_running_or_notify_cancel():
            return
        if error is not None:
            self.future.set_exception(error)
        else:
            self.future.set_result(result)


class RpcClient:
    """A connection to one life of one server.

    Every call has an id and a deadline: a late reply is dropped, a missing one raises `DeadlineExceeded`. When the
    connection is lost, or `liveness()` returns why the peer is dead, every pending call and every later one raises
    `EngineDiedError` at once; there is no reconnection, because the next server at the same address would not know the
    calls that were under way. Thread safe. Chunk callbacks run on the I/O thread and must neither block nor call back.

    `errors` maps error codes to the types that are raised; others become `RemoteError`.
    """

    def __init__(
        self,
        address: str,
        reply_type: Any,
        *,
        errors: Mapping[str, type[Exception]],
        liveness: Callable[[], str | None] | None = None,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        connect_timeout_s: float = 10.0,
        name: str = "rpc",
    ) -> None:
        self.address = address
        self._errors = errors
        self._liveness = liveness
        self._max_bytes = max_message_bytes
        self._reply_decoder = msgspec.msgpack.Decoder(reply_type)
        self._error_decoder = msgspec.msgpack.Decoder(ErrorReply)
        self._header_decoder = msgspec.msgpack.Decoder(ReplyHeader)
        self._ids = itertools.count(1)
        self._lock = threading.Lock()
        self._outbox: deque[tuple[int, bytes, bytes]] = deque()
        self._pending: dict[int, _Pending] = {}
        self._deadlines: list[tuple[float, int]] = []
        self._dead: str | None = None
        self._closing = False
        self._connected = False
        self._connect_timeout_s = connect_timeout_s
        self._give_up = time.monotonic() + connect_timeout_s
        self._next_liveness = 0.0
        self._next_connect: float | None = None
        self._context = zmq.Context()
        self._wake = WakeUp()
        try:
            self._open_socket()
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            self._wake.close()
            raise ValueError(
                f"not an address: got {address!r} ({error}), expected one like "
                '"ipc:///tmp/folder/socket" or "tcp://127.0.0.1:5555"; use the address that the engine printed'
            ) from None
        self._thread = threading.Thread(target=self._run, name=f"{name}-client", daemon=True)
        self._thread.start()

    def call(self, body: Any, timeout_s: float) -> Any:
        """Send `body`, wait for the answer; raises what the other side raised."""
        assert threading.current_thread() is not self._thread, "a chunk callback must not call back"
        return self.submit(body, timeout_s).result()

    def submit(
        self, body: Any, timeout_s: float, on_chunk: Callable[[Any], None] | None = None
    ) -> "Future[Any]":
        """Send `body` and return at once. Calls of one thread arrive in the order in which they were submitted."""
        timeout_s = check_timeout(timeout_s)
        frame = check_size(msgspec.msgpack.encode(body), self._max_bytes, type(body).__name__)
        pending = _Pending(type(body).__name__, timeout_s, on_chunk)
        with self._lock:
            if self._dead is not None:
                pending.resolve(error=EngineDiedError(self._dead))
                return pending.future
            call_id = next(self._ids)
            header = RequestHeader(protocol=PROTOCOL_VERSION, id=call_id, timeout_s=timeout_s)
            self._pending[call_id] = pending
            heapq.heappush(self._deadlines, (pending.deadline, call_id))
            self._outbox.append((call_id, msgspec.msgpack.encode(header), frame))
        self._wake.set()
        return pending.future

    @property
    def dead(self) -> str | None:
        """Why no call will ever be answered again, or None."""
        return self._dead

    def close(self) -> None:
        """End the connection; pending calls raise `EngineDiedError`. Safe to repeat."""
        self._closing = True
        self._wake.set()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=10.0)

    # The rest runs on the I/O thread.

    def _open_socket(self) -> None:
        socket = self._context.socket(zmq.DEALER)
        self._socket = socket
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.MAXMSGSIZE, self._max_bytes)
        socket.setsockopt(zmq.SNDHWM, 0)
        socket.setsockopt(zmq.RCVHWM, 0)
        socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_INTERVAL_MS)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
        # One connection per socket: queued calls must never be delivered to a later server.
        socket.setsockopt(zmq.RECONNECT_IVL, -1)
        self._monitor = socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | _LOST | _FAILED)
        socket.connect(self.address)
        self._poller = zmq.Poller()
        self._poller.register(socket, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)
        self._poller.register(self._wake.fileno(), zmq.POLLIN)

    def _close_socket(self) -> None:
        self._socket.disable_monitor()
        self._monitor.close(0)
        self._socket.close(0)

    def _run(self) -> None:
        reason = "the client was closed; make a new one"
        try:
            while not self._closing and self._dead is None:
                self._poller.poll(self._poll_ms())
                self._wake.clear()
                if self._connected:
                    self._flush()
                self._receive()
                self._watch_connection()
                self._expire()
                self._check_liveness()
        except Exception as error:  # nobody may wait for ever, whatever went wrong here
            logger.exception("the client's I/O thread failed")
            reason = f"the client's I/O thread failed: {error!r}; make a new client"
        finally:
            self._die(reason)
            self._close_socket()
            self._context.term()
            self._wake.close()

    def _poll_ms(self) -> int:
        now = time.monotonic()
        until = [self._next_connect] if self._next_connect is not None else []
        with self._lock:
            if self._deadlines:
                until.append(self._deadlines[0][0])
            if self._pending and self._liveness is not None:
                until.append(self._next_liveness)
        if not self._connected:
            until.append(self._give_up)
        if not until:
            return -1
        return max(0, min(60_000, int((min(until) - now) * 1e3) + 1))

    def _flush(self) -> None:
        while self._outbox:
            call_id, header, body = self._outbox.popleft()
            if call_id in self._pending:  # else its deadline passed before it could be sent
                self._socket.send_multipart((header, body), zmq.NOBLOCK)

    def _receive(self) -> None:
        while True:
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                header = self._header_decoder.decode(frames[0])
                body = frames[1]
            except (IndexError, *UNREADABLE) as error:
                logger.warning("dropped a reply without a readable header: %s", error)
                continue
            self._deliver(header, body)

    def _deliver(self, header: ReplyHeader, frame: bytes) -> None:
        final = header.kind != "chunk"
        with self._lock:
            pending = self._pending.get(header.id)
            if pending is not None and final:
                del self._pending[header.id]
        if pending is None:
            return  # late: its deadline passed, or the caller gave up
        try:
            if header.kind == "error":
                pending.resolve(error=raised(self._error_decoder.decode(frame), self._errors))
                return
            body = self._reply_decoder.decode(frame)
        except UNREADABLE as error:
            unreadable = ProtocolError(
                f"the reply to {pending.what} cannot be understood: {error}; expected a message "
                f"of protocol {PROTOCOL_VERSION}; check that both sides run the same release"
            )
            self._fail(header.id, pending, unreadable)
            return
        if final:
            pending.resolve(body)
        elif pending.on_chunk is not None:
            try:
                pending.on_chunk(body)
            except Exception as error:  # a callback that raises fails this one call
                self._fail(header.id, pending, error)

    def _fail(self, call_id: int, pending: _Pending, error: Exception) -> None:
        with self._lock:
            self._pending.pop(call_id, None)
        pending.resolve(error=error)

    def _watch_connection(self) -> None:
        while True:
            try:
                event = recv_monitor_message(self._monitor, zmq.NOBLOCK)["event"]
            except zmq.Again:
                break
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._connected = True
                self._flush()
            elif self._connected:
                self._receive()  # what was answered before the end still counts
                self._die(
                    self._why_lost()
                    or f"the connection to {self.address} was lost; expected a living engine; "
                    "see what it said on its standard error, start it again and connect anew"
                )
                return
            elif self._next_connect is None:
                self._next_connect = time.monotonic() + _CONNECT_RETRY_S
        now = time.monotonic()
        if not self._connected and now >= self._give_up:
            self._die(
                f"nobody answers at {self.address}: tried for {self._connect_timeout_s:.1f} s; expected a "
                "running engine; check the address, and that the engine is alive"
            )
        elif self._next_connect is not None and now >= self._next_connect:
            self._next_connect = None
            self._close_socket()
            self._open_socket()

    def _expire(self) -> None:
        now = time.monotonic()
        expired = []
        with self._lock:
            while self._deadlines and self._deadlines[0][0] <= now:
                pending = self._pending.pop(heapq.heappop(self._deadlines)[1], None)
                if pending is not None:
                    expired.append(pending)
        for pending in expired:
            state = "connected" if self._connected else "not connected yet"
            pending.resolve(
                error=DeadlineExceeded(
                    f"{pending.what} was not answered within {pending.timeout_s:.3f} s by {self.address} "
                    f"({state}); whatever arrives later is dropped; raise the timeout or look at the engine"
                )
            )

    def _why_lost(self) -> str | None:
        """Why the peer is dead, if it is: a process closes its sockets a moment before its parent hears of its end."""
        patience = time.monotonic() + _LAST_MOMENTS_S
        while self._liveness is not None:
            why = self._liveness()
            if why is not None or time.monotonic() >= patience:
                return why
            time.sleep(0.01)
        return None

    def _check_liveness(self) -> None:
        now = time.monotonic()
        if self._liveness is None or not self._pending or now < self._next_liveness:
            return
        self._next_liveness = now + _LIVENESS_INTERVAL_S
        why = self._liveness()
        if why is not None:
            self._receive()
            self._die(why)

    def _die(self, reason: str) -> None:
        with self._lock:
            if self._dead is None:
                self._dead = reason
            pending = list(self._pending.values())
            self._pending.clear()
            self._outbox.clear()
        for call in pending:
            call.resolve(error=EngineDiedError(self._dead))
