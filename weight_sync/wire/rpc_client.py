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

from ..errors import (
    ConnectionLostError,
    DeadlineExceeded,
    EngineDiedError,
    ProtocolError,
    UnauthorizedError,
)
from .deadline import PeerClock
from .keys import Address, shown
from .messages import ErrorReply
from .process import Home
from .rpc_wire import (
    CLOCK_ID,
    MAX_MESSAGE_BYTES,
    PROTOCOL_VERSION,
    UNREADABLE,
    ReplyHeader,
    RequestHeader,
    WakeUp,
    check_size,
    check_timeout,
    raised,
    watch_peer,
)

logger = logging.getLogger(__name__)

_LIVENESS_INTERVAL_S = 0.2
_CONNECT_RETRY_S = 0.02
_ASK_CLOCK_AGAIN_S = 1.0
_LAST_WORD_MS = 200
"""How long a closing socket may take to send what it has accepted."""
_REFUSED_FOR_S = 1.0
"""How long handshakes must have failed until it is no accident, such as a server that just ends."""
_LOST = zmq.EVENT_DISCONNECTED
_HANDSHAKE_FAILED = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)
_FAILED = zmq.EVENT_CLOSED | _HANDSHAKE_FAILED


class _Pending:
    """A call that was not answered yet."""

    __slots__ = ("deadline", "future", "on_chunk", "sent", "timeout_s", "what")

    def __init__(self, what: str, timeout_s: float, on_chunk: Callable[[Any], None] | None) -> None:
        self.what = what
        self.timeout_s = timeout_s
        self.deadline = time.monotonic() + timeout_s
        self.on_chunk = on_chunk
        self.sent = False
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

    Every call has an id and a deadline: a late reply is dropped, a missing one raises `DeadlineExceeded`, and a call
    that is read after its deadline is not carried out. When the connection is lost, or `liveness()` returns why the
    peer is dead, every pending call and every later one raises `EngineDiedError` at once. Only where `liveness()`
    says that the peer lives is there another connection: calls that were under way then raise `ConnectionLostError`,
    later ones go on. Without it there is none, because the next server at the same address may be another one. Thread
    safe. Chunk callbacks run on the I/O thread and must neither block nor call back. A forked child is refused at once.

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
        self._place = Address.of_client(address)
        self._keys = self._place.client_keys()
        self.address = self._place.endpoint
        """Where the server is, without the key."""
        self._errors = errors
        self._liveness = liveness
        self._max_bytes = max_message_bytes
        self._reply_decoder = msgspec.msgpack.Decoder(reply_type)
        self._error_decoder = msgspec.msgpack.Decoder(ErrorReply)
        self._header_decoder = msgspec.msgpack.Decoder(ReplyHeader)
        self._home = Home(f"the connection to {shown(address)}")
        self._ids = itertools.count(CLOCK_ID + 1)
        # Entered again by the thread that holds it when a collected publisher says good-bye.
        self._lock = threading.RLock()
        self._outbox: deque[tuple[int, bytes]] = deque()
        self._clock = PeerClock()
        self._next_ask = 0.0
        self._pending: dict[int, _Pending] = {}
        self._deadlines: list[tuple[float, int]] = []
        self._dead: str | None = None
        self._death: type[Exception] = EngineDiedError
        self._refused_since: float | None = None
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
                f"not an address: got {shown(address)!r} ({zmq.strerror(error.errno or 0)}), expected one like "
                '"ipc:///tmp/folder/socket" or "tcp://127.0.0.1:5555"; use `engine.address`, '
                "or what the engine was told to listen at"
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
        self._home.check()
        timeout_s = check_timeout(timeout_s)
        frame = check_size(msgspec.msgpack.encode(body), self._max_bytes, type(body).__name__)
        pending = _Pending(type(body).__name__, timeout_s, on_chunk)
        with self._lock:
            if self._dead is not None:
                pending.resolve(error=self._death(self._dead))
                return pending.future
            call_id = next(self._ids)
            self._pending[call_id] = pending
            heapq.heappush(self._deadlines, (pending.deadline, call_id))
            self._outbox.append((call_id, frame))
        self._wake.set()
        return pending.future

    @property
    def dead(self) -> str | None:
        """Why no call will ever be answered again, or None."""
        return self._dead

    def close(self, *, wait: bool = True) -> None:
        """End the connection; pending calls raise `EngineDiedError`. Safe to repeat; in a forked child, nothing.

        Without `wait` it takes no lock and blocks nowhere, so that a finalizer may call it on any thread.
        """
        if not self._home.here:
            return
        self._closing = True
        self._wake.set()
        if wait and self._thread is not threading.current_thread():
            self._thread.join(timeout=10.0)

    # The rest runs on the I/O thread.

    def _open_socket(self) -> None:
        socket = self._context.socket(zmq.DEALER)
        self._socket = socket
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.IPV6, "[" in self.address)
        socket.setsockopt(zmq.MAXMSGSIZE, self._max_bytes)
        socket.setsockopt(zmq.SNDHWM, 0)
        socket.setsockopt(zmq.RCVHWM, 0)
        watch_peer(socket, self.address)
        if self._keys is not None:
            self._keys.apply(socket)
        # One connection per socket: queued calls must never be delivered to a later server.
        socket.setsockopt(zmq.RECONNECT_IVL, -1)
        self._monitor = socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | _LOST | _FAILED)
        socket.connect(self.address)
        self._poller = zmq.Poller()
        self._poller.register(socket, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)
        self._poller.register(self._wake.fileno(), zmq.POLLIN)

    def _close_socket(self, linger_ms: int = 0) -> None:
        self._socket.disable_monitor()
        self._monitor.close(0)
        self._socket.close(linger_ms)

    def _run(self) -> None:
        reason = "the client was closed; make a new one"
        try:
            while not self._closing and self._dead is None:
                self._poller.poll(self._poll_ms())
                self._wake.clear()
                self._flush()
                self._receive()
                self._watch_connection()
                self._expire()
                self._check_liveness()
            self._flush()
        except Exception as error:  # nobody may wait for ever, whatever went wrong here
            logger.exception("the client's I/O thread failed")
            reason = f"the client's I/O thread failed: {error!r}; make a new client"
        finally:
            self._die(reason)
            self._close_socket(_LAST_WORD_MS)
            self._context.term()
            self._wake.close()

    def _poll_ms(self) -> int:
        now = time.monotonic()
        until = [self._next_connect] if self._next_connect is not None else []
        with self._lock:
            if self._deadlines:
                until.append(self._deadlines[0][0])
            if self._watches_life:
                until.append(self._next_liveness)
            if self._outbox and self._connected:
                until.append(self._next_ask)
        if not self._connected:
            until.append(self._give_up)
        if not until:
            return -1
        return max(0, min(60_000, int((min(until) - now) * 1e3) + 1))

    @property
    def _watches_life(self) -> bool:
        return self._liveness is not None and (bool(self._pending) or not self._connected)

    def _flush(self) -> None:
        """Send what waits, once it is known when the server is to give it up."""
        if not self._connected or not self._outbox:
            return
        now = time.monotonic()
        if not self._clock.is_fresh(now):
            if now >= self._next_ask:
                self._next_ask = now + _ASK_CLOCK_AGAIN_S
                self._send(
                    RequestHeader(protocol=PROTOCOL_VERSION, id=CLOCK_ID, timeout_s=0.0), b""
                )
            return
        while self._outbox:
            call_id, body = self._outbox[0]
            pending = self._pending.get(call_id)
            if pending is not None:  # else its deadline passed before it could be sent
                deadline = self._clock.at(pending.deadline)
                header = RequestHeader(
                    protocol=PROTOCOL_VERSION,
                    id=call_id,
                    timeout_s=pending.timeout_s,
                    deadline=deadline,
                )
                if not self._send(header, body):
                    return
                pending.sent = True
            self._outbox.popleft()

    def _send(self, header: RequestHeader, body: bytes) -> bool:
        """False when the connection has just gone, which is noticed next."""
        try:
            self._socket.send_multipart((msgspec.msgpack.encode(header), body), zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

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
            if header.clock is not None:
                self._clock.note(header.clock, time.monotonic())
            if header.id == CLOCK_ID:
                self._answer_clock(header, body)
            else:
                self._deliver(header, body)

    def _answer_clock(self, header: ReplyHeader, frame: bytes) -> None:
        """The server told its clock, or why it will not talk to us."""
        if header.kind != "error":
            self._flush()
            return
        self._next_ask = 0.0
        try:
            error = raised(self._error_decoder.decode(frame), self._errors)
        except UNREADABLE as unreadable:
            error = ProtocolError(f"the server's refusal cannot be understood: {unreadable}")
        with self._lock:
            refused = list(self._pending.values())
            self._pending.clear()
            self._outbox.clear()
        for pending in refused:
            pending.resolve(error=error)

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
            self._note_refusal(event)
            if self._dead is not None:
                return
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._connected = True
                self._fail_sent()
                self._flush()
            elif self._connected:
                self._receive()  # what was answered before the end still counts
                self._lost()
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

    def _note_refusal(self, event: int) -> None:
        """A server that closes the connection instead of shaking hands, again and again, wants another key."""
        if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            self._refused(0.0)
        elif event & _HANDSHAKE_FAILED and self.address.startswith("tcp://"):
            self._refused(_REFUSED_FOR_S)
        elif event & (zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_CLOSED):
            self._refused_since = None

    def _refused(self, patience_s: float) -> None:
        now = time.monotonic()
        self._refused_since = self._refused_since or now
        if now - self._refused_since < min(patience_s, self._connect_timeout_s):
            return
        self._death = UnauthorizedError
        given = "the key of another engine, or of an earlier one" if self._keys else "no key"
        self._die(
            f"the server at {self.address} does not shake hands: got {given}, expected the one that belongs to its "
            "address; use engine.address as a whole, with what stands behind its question mark"
        )

    def _lost(self) -> None:
        """The connection is gone. Connect anew where the peer is known to live."""
        why = (
            f"the connection to {self.address} was lost; expected a living engine; "
            "see what it said on its standard error, start it again and connect anew"
            if self._liveness is None
            else self._liveness()
        )
        if why is not None:
            self._die(why)
            return
        logger.warning("the connection to %s was lost, and the engine lives", self.address)
        self._connected = False
        self._clock, self._next_ask = PeerClock(), 0.0
        self._give_up = time.monotonic() + self._connect_timeout_s
        self._next_liveness = 0.0
        self._close_socket()
        self._open_socket()

    def _fail_sent(self) -> None:
        """A new connection: what was under way over an older one is never answered."""
        with self._lock:
            lost = [call_id for call_id, pending in self._pending.items() if pending.sent]
            failed = [self._pending.pop(call_id) for call_id in lost]
        for pending in failed:
            pending.resolve(
                error=ConnectionLostError(
                    f"the connection to {self.address} broke under {pending.what}, and there is a new one: whether it "
                    "was carried out is not known; ask the engine, and call again"
                )
            )

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

    def _check_liveness(self) -> None:
        now = time.monotonic()
        if not self._watches_life or now < self._next_liveness:
            return
        assert self._liveness is not None
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
            call.resolve(error=self._death(self._dead))
