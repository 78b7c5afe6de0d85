"""The envelope of every remote call: what both ends of `rpc` agree on.

A request is two frames, header and body; so is a reply. The header alone says which call a frame belongs to, so that
a body which cannot be understood is still answered. Bodies are msgspec structs in MessagePack; nothing is unpickled.

A deadline travels as a duration and as a point on the server's clock, because a message may wait long before it is
read (a stopped process, a full machine). A caller asks for that clock when it connects, and sends nothing before it
knows it; every reply tells it again. What is read after its deadline is not carried out.
"""

import socket
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Protocol

import msgspec
import zmq
from msgspec import Meta

from ..errors import DeadlineExceeded, ProtocolError, RemoteError, SyncError
from .keys import is_on_this_machine
from .messages import MAX_MESSAGE_BYTES, PROTOCOL_VERSION, ErrorReply, Seconds

MAX_ERROR_CHARS = 1 << 18
"""Longer error texts are cut: an error must always be deliverable."""

UNREADABLE = (msgspec.MsgspecError, ValueError, OverflowError, RecursionError)
"""What decoding may raise; text that is no UTF-8 is a `ValueError` of Python's own."""

REFUSALS = (SyncError, ValueError)
"""What is raised on purpose; other errors are accidents."""

HEARTBEAT_INTERVAL_MS = 2_000
HEARTBEAT_TIMEOUT_MS = 30_000
"""A machine that vanished without closing its connection is noticed after this long; ZeroMQ's own thread answers, so a
process that is merely busy is not affected. Between processes of one machine there are no heartbeats: the system closes
the connections of a process that ends, and one that is stopped for a while is none the worse for it."""

CLOCK_ID = 0
"""A request of this id has no body, and asks for nothing but the server's clock."""


class RequestHeader(
    msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, kw_only=True
):
    """First frame of a request."""

    protocol: int
    """`PROTOCOL_VERSION` of the caller."""
    id: Annotated[int, Meta(ge=0, le=2**62)]
    """Chosen by the caller, never used twice on one connection."""
    timeout_s: Seconds
    """How long the caller was going to wait when it asked."""
    deadline: float | None = None
    """Server's `time.monotonic()` at which it stops waiting, or a little before; None: not known."""


class ReplyHeader(
    msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, kw_only=True
):
    """First frame of a reply."""

    protocol: int
    """`PROTOCOL_VERSION` of the server."""
    id: Annotated[int, Meta(ge=0, le=2**62)]
    """The request's."""
    kind: Literal["reply", "chunk", "error", "clock"]
    """A chunk is followed by more; the others are the last of their call. "clock" has an empty body."""
    clock: float | None = None
    """Server's `time.monotonic()` when this was answered."""


class Call(Protocol):
    """One request in the hands of a server. Every method may be called from any thread; none of them blocks."""

    @property
    def body(self) -> Any:
        """The decoded request."""

    @property
    def deadline(self) -> float:
        """`time.monotonic()` after which nobody waits for the answer."""

    @property
    def peer(self) -> str:
        """Which connection it came from; equal for all calls of one client."""

    def reply(self, body: Any) -> None:
        """The answer. The first `reply` or `fail` of a call counts, later ones are dropped."""

    def stream(self, body: Any) -> None:
        """One chunk, in order, before the answer; dropped after it."""

    def fail(self, error: BaseException) -> None:
        """Answer with an error; its class name is the code under which the caller looks up a type."""


def error_reply(error: BaseException) -> ErrorReply:
    """`error` as it travels."""
    text = str(error) or type(error).__name__
    if len(text) > MAX_ERROR_CHARS:
        text = text[:MAX_ERROR_CHARS] + " ... (cut)"
    if isinstance(error, msgspec.MsgspecError | UnicodeDecodeError):
        return ErrorReply(code=ProtocolError.__name__, message=text)
    return ErrorReply(code=type(error).__name__, message=text)


def raised(reply: ErrorReply, errors: Mapping[str, type[Exception]]) -> Exception:
    """The exception that `reply` stands for; `RemoteError` where its code is not in `errors`."""
    known = errors.get(reply.code)
    if known is not None:
        return known(reply.message)
    return RemoteError(f"the other side failed with {reply.code}: {reply.message}")


def typed(error: BaseException, what: str) -> Exception:
    """`error` where callers know its type, else what a caller on the other side of a wire gets for it."""
    if isinstance(error, REFUSALS):
        return error
    late = isinstance(error, TimeoutError)
    found = (DeadlineExceeded if late else RemoteError)(
        f"{what} failed with {type(error).__name__}: {error}; look at the engine's log"
    )
    found.__cause__ = error
    return found


def watch_peer(socket: "zmq.Socket[bytes]", address: str) -> None:
    """Heartbeats, where the other end may vanish without closing its connection."""
    if not is_on_this_machine(address):
        socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_INTERVAL_MS)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)


def check_timeout(timeout_s: float, name: str = "timeout_s") -> float:
    """`timeout_s`, or a `ValueError` when it is not a deadline that will ever come."""
    if not (isinstance(timeout_s, int | float) and 0 < timeout_s <= 7 * 86_400):
        raise ValueError(
            f"{name} must be a number of seconds above 0 and at most a week; got {timeout_s!r}; "
            "every remote call has a deadline"
        )
    return float(timeout_s)


def check_size(frame: bytes, max_bytes: int, what: str) -> bytes:
    """`frame`, or a `ProtocolError` when the other side would refuse it."""
    if len(frame) > max_bytes:
        raise ProtocolError(
            f"{what} is too large: got {len(frame)} bytes, expected at most {max_bytes}; "
            "split the call, or move the bytes through an arena"
        )
    return frame


class WakeUp:
    """Lets any thread wake the one that polls sockets."""

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)

    def fileno(self) -> int:
        """What to poll for input."""
        return self._reader.fileno()

    def set(self) -> None:
        """Wake the poller, now or at its next poll."""
        try:
            self._writer.send(b"\0")
        except OSError:
            pass  # full: it is going to wake anyway; closed: there is nobody to wake

    def clear(self) -> None:
        """Forget what was set; the poller calls this before it looks at its queues."""
        try:
            while len(self._reader.recv(4096)) == 4096:
                pass
        except OSError:
            pass

    def close(self) -> None:
        """Give back both descriptors."""
        self._reader.close()
        self._writer.close()


__all__ = [
    "CLOCK_ID",
    "MAX_MESSAGE_BYTES",
    "PROTOCOL_VERSION",
    "REFUSALS",
    "UNREADABLE",
    "Call",
    "ReplyHeader",
    "RequestHeader",
    "WakeUp",
    "check_size",
    "check_timeout",
    "error_reply",
    "is_on_this_machine",
    "raised",
    "typed",
    "watch_peer",
]
