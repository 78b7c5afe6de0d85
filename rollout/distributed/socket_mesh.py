"""Small messages between ranks over sockets of their own, read by the thread that waits for them.

gloo hands a message to a thread that sends it, from one that hears of it back to that one, and on to whoever waits: 415
microseconds (145 at best) for what takes 53 (19) here, 3 KB between two processes of two cores.
"""

from __future__ import annotations

import hmac
import secrets
import select
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Self

import msgspec

from weight_sync.errors import DeadlineExceeded, ProtocolError, TransportError
from weight_sync.time_left import left_s

from .stateless_process_group import StatelessProcessGroup

LARGEST_BYTES = 16 << 10
"""What had better go another way is larger: this much lies in the buffers of a connection, and nobody waits for it."""
_TOKEN_BYTES = 32
_HELLO = struct.Struct(f"<I{_TOKEN_BYTES}s")
_HEAD = struct.Struct("<QQ")
"""Before every message: `_KINDS` times the number of the call plus the kind of message; and how many bytes follow."""
_KINDS = 4
_GATHERED, _TOLD, _TAKEN = range(3)
_MOST_BYTES = 1 << 30
_PIECE_BYTES = 1 << 20
_HELLO_S = 2.0
"""How long somebody may take to say who it is."""
_MOST_STRANGERS = 64
"""So many may be about to say so; of more the first one goes."""
_SHORTEST_S = 0.001


class _Listening(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where a rank waits for those of higher numbers."""

    host: str
    """Address."""
    port: int
    """Its port."""
    token: bytes
    """What whoever connects must know."""


class SocketMesh:
    """A connection between every two ranks. Each makes the same calls in the same order, one thread at a time; `close`
    from any.

    A call that a rank does not join ends by its deadline with `DeadlineExceeded`, one whose peer has gone with
    `TransportError`, one where another rank makes another call with `ProtocolError`. The mesh is of no more use then:
    later calls raise `TransportError`, lest they take what was meant for the one that failed.
    """

    def __init__(self, rank: int, name: str, peers: dict[int, socket.socket]) -> None:
        self._rank = rank
        self._name = name
        self._peers = peers
        self._lock = threading.Lock()
        self._busy = False
        self._closed = False
        self._failed = False
        self._num_calls = 0
        for connection in peers.values():
            connection.setblocking(False)

    @classmethod
    def open(cls, meeting: StatelessProcessGroup, *, timeout_s: float) -> Self:
        """Connect the ranks of `meeting`; called once by each of them."""
        end = time.monotonic() + timeout_s
        host = meeting.address
        peers: dict[int, socket.socket] = {}
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            with socket.create_server((host, 0), family=family) as listener:
                token = secrets.token_bytes(_TOKEN_BYTES)
                mine = _Listening(host=host, port=listener.getsockname()[1], token=token)
                others = meeting.all_gather_obj(mine, type=_Listening, timeout_s=left_s(end))
                for rank, other in enumerate(others[: meeting.rank]):
                    peers[rank] = socket.create_connection(
                        (other.host, other.port), timeout=_left(end)
                    )
                    peers[rank].sendall(_HELLO.pack(meeting.rank, other.token))
                _let_in(listener, token, {*range(meeting.rank + 1, meeting.size)}, peers, end)
        except BaseException as error:
            for connection in peers.values():
                connection.close()
            if not isinstance(error, OSError):
                raise
            missing = sorted({*range(meeting.size)} - {*peers, meeting.rank})
            what = f"group {meeting.name!r}, rank {meeting.rank}: got {error} from ranks {missing}"
            if isinstance(error, TimeoutError):
                raise DeadlineExceeded(
                    f"{what}, expected a connection within {timeout_s:.1f} s; look for one that is late or dead"
                ) from error
            raise TransportError(
                f"{what}, expected a connection; look whether they live, and reach {host}"
            ) from error
        for connection in peers.values():
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return cls(meeting.rank, meeting.name, peers)

    def all_gather(self, data: bytes, *, timeout_s: float) -> list[bytes]:
        """Every rank's `data`, in rank order: at most `LARGEST_BYTES`, equally long on all."""
        end = time.monotonic() + timeout_s
        with self._using("an all_gather"):
            head = self._head(_GATHERED, len(data))
            found = self._exchange(head + data, head, len(data), end)
        return [found.get(rank, data) for rank in range(len(self._peers) + 1)]

    def broadcast(self, data: bytes | None, src: int, *, timeout_s: float) -> bytes:
        """`data` of rank `src`, of any length, on all ranks; `src` returns when all have it."""
        end = time.monotonic() + timeout_s
        with self._using("a broadcast"):
            taken = self._head(_TAKEN, 0)
            if self._rank == src:
                assert data is not None, "the source passes it"
                self._exchange(self._head(_TOLD, len(data)) + data, taken, 0, end)
                return data
            head = self._take(src, _HEAD.size, end)
            _, length = _HEAD.unpack(head)
            if head != self._head(_TOLD, length) or length > _MOST_BYTES:
                raise self._wrong_head(src, head)
            found = self._take(src, length, end)
            self._talk({src: taken}, {}, b"", end)
            return found

    def close(self) -> None:
        """End the connections: calls that wait, here and elsewhere, fail. Safe to repeat."""
        with self._lock:
            self._closed = True
            idle = not self._busy
        for connection in self._peers.values():
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)  # closing alone would wake nobody
            if idle:
                connection.close()

    @contextmanager
    def _using(self, what: str) -> Iterator[None]:
        with self._lock:
            if self._closed or self._failed:
                raise TransportError(
                    f"group {self._name!r}: got {what} after {'it was closed' if self._closed else 'a call failed'}, "
                    "expected an open group; make a new one"
                )
            self._busy = True
        self._num_calls += 1
        self._failed = True  # Unless it comes to its end.
        try:
            yield
            self._failed = False
        finally:
            with self._lock:
                self._busy = False
                closed = self._closed
            if closed:
                self.close()

    def _head(self, kind: int, num_bytes: int) -> bytes:
        return _HEAD.pack(_KINDS * self._num_calls + kind, num_bytes)

    def _exchange(
        self, message: bytes, head: bytes, num_bytes: int, end: float
    ) -> dict[int, bytes]:
        """Send `message` to all, and take from all what follows their `head`."""
        found = {rank: _Wanted(len(head) + num_bytes) for rank in self._peers}
        self._talk(dict.fromkeys(self._peers, message), found, head, end)
        return {rank: bytes(wanted.data[len(head) :]) for rank, wanted in found.items()}

    def _take(self, rank: int, num_bytes: int, end: float) -> bytes:
        wanted = _Wanted(num_bytes)
        if num_bytes:
            self._receive(rank, wanted, b"")  # The rest of a message is there already.
        if wanted.num_left:
            self._talk({}, {rank: wanted}, b"", end)
        return bytes(wanted.data)

    def _talk(
        self, messages: dict[int, bytes], wanted: dict[int, _Wanted], head: bytes, end: float
    ) -> None:
        """Send each rank its message, and take what is wanted of each, begun by `head`; whoever is ready comes first.

        So nobody has to read for others to get rid of what they send, and the end of one rank is known while another is
        late.
        """
        unsent: dict[int, memoryview] = {}
        for rank, message in messages.items():
            if rest := self._send(rank, memoryview(message)):
                unsent[rank] = rest
        late = {rank for rank, one in wanted.items() if one.num_left}
        waits, ranks = select.poll(), {}
        for rank in {*unsent, *late}:
            ranks[self._peers[rank].fileno()] = rank
            waits.register(self._peers[rank], _events(rank in unsent, rank in late))
        while ranks:
            left = end - time.monotonic()
            ready = waits.poll(max(0.0, 1e3 * left))
            for descriptor, events in ready:
                rank = ranks[descriptor]
                if rank in late and events & ~select.POLLOUT:
                    self._receive(rank, wanted[rank], head)
                    if not wanted[rank].num_left:
                        late.remove(rank)
                if rank in unsent and events & ~select.POLLIN:
                    unsent[rank] = self._send(rank, unsent[rank])
                    if not unsent[rank]:
                        del unsent[rank]
                if rank in unsent or rank in late:
                    waits.modify(descriptor, _events(rank in unsent, rank in late))
                else:
                    waits.unregister(descriptor)
                    del ranks[descriptor]
            if ranks and (not ready or left <= 0.0):
                what = "a message from" if late else "a message to"
                raise self._error(what, min(late or unsent), TimeoutError())

    def _send(self, rank: int, data: memoryview) -> memoryview:
        """What is left of it; does not wait."""
        try:
            return data[self._peers[rank].send(data) :]
        except BlockingIOError:
            return data
        except OSError as error:
            raise self._error("a message to", rank, error) from error

    def _receive(self, rank: int, wanted: _Wanted, head: bytes) -> None:
        """Some of what is wanted; does not wait."""
        try:
            more = self._peers[rank].recv(min(wanted.num_left, _PIECE_BYTES))
            if not more:
                raise ConnectionResetError("the end of the connection")
        except BlockingIOError:
            return
        except OSError as error:
            raise self._error("a message from", rank, error) from error
        wanted.data += more
        if not head.startswith(wanted.data[: len(head)]):
            raise self._wrong_head(rank, bytes(wanted.data[: len(head)]))

    def _wrong_head(self, rank: int, head: bytes) -> ProtocolError:
        call, length = _HEAD.unpack(head.ljust(_HEAD.size, b"\0"))
        return ProtocolError(
            f"group {self._name!r}, rank {self._rank}: got a message of {length} bytes of call {call // _KINDS} (kind "
            f"{call % _KINDS}) from rank {rank}, expected at most {_MOST_BYTES} of call {self._num_calls}; have all "
            "ranks call the same methods in the same order"
        )

    def _error(self, what: str, rank: int, error: OSError) -> DeadlineExceeded | TransportError:
        text = f"group {self._name!r}, rank {self._rank}: {what} rank {rank}"
        if isinstance(error, TimeoutError):
            return DeadlineExceeded(
                f"{text}: got no end of it by its deadline, expected every member to take part; look for one that is "
                "late or stopped, and make a new group"
            )
        return TransportError(
            f"{text} failed, got {str(error)!r}, expected every member to live; look for one that died, and make a new "
            "group"
        )


@dataclass(slots=True)
class _Wanted:
    """What is to come from a rank."""

    num_bytes: int
    """How much in all."""
    data: bytearray = field(default_factory=bytearray)
    """What has."""

    @property
    def num_left(self) -> int:
        return self.num_bytes - len(self.data)


def _events(sends: bool, receives: bool) -> int:
    return (select.POLLOUT if sends else 0) | (select.POLLIN if receives else 0)


@dataclass(slots=True)
class _Stranger:
    """Somebody who has connected."""

    connection: socket.socket
    until: float
    """When its time to say who it is ends."""
    said: bytes = b""
    """What it has said."""

    def listen(self) -> bool:
        """Whether it may still say more; does not wait."""
        try:
            more = self.connection.recv(_HELLO.size - len(self.said))
        except BlockingIOError:
            return True
        except OSError:
            return False
        self.said += more
        return bool(more) and len(self.said) < _HELLO.size

    def rank(self, token: bytes) -> int:
        """The rank that it is; -1: none."""
        if len(self.said) < _HELLO.size:
            return -1
        rank, said = _HELLO.unpack(self.said)
        return int(rank) if hmac.compare_digest(said, token) else -1


def _let_in(
    listener: socket.socket,
    token: bytes,
    ranks: set[int],
    peers: dict[int, socket.socket],
    end: float,
) -> None:
    """Put the connections of `ranks` into `peers`. Who says nothing, or something else, keeps nobody waiting."""
    listener.setblocking(False)
    strangers: dict[int, _Stranger] = {}  # By descriptor; the first come first.
    waits = select.poll()
    waits.register(listener, select.POLLIN)
    with ExitStack() as undo:

        def dismiss(descriptor: int) -> socket.socket:
            waits.unregister(descriptor)
            return strangers.pop(descriptor).connection

        def close(descriptors: list[int]) -> None:
            for descriptor in descriptors:
                dismiss(descriptor).close()

        undo.callback(lambda: close(list(strangers)))
        while ranks - peers.keys():
            if time.monotonic() >= end:
                raise TimeoutError("timed out")
            for descriptor, _ in waits.poll(1e3 * min(_HELLO_S, _left(end))):
                if descriptor == listener.fileno():
                    with suppress(BlockingIOError, ConnectionAbortedError):
                        connection, _ = listener.accept()
                        connection.setblocking(False)
                        until = time.monotonic() + _HELLO_S
                        strangers[connection.fileno()] = _Stranger(connection, until)
                        waits.register(connection, select.POLLIN)
                elif not strangers[descriptor].listen():
                    rank = strangers[descriptor].rank(token)
                    connection = dismiss(descriptor)
                    if rank in ranks - peers.keys():
                        peers[rank] = connection
                    else:
                        connection.close()  # whoever it is
            now = time.monotonic()
            late = [d for d, one in strangers.items() if one.until <= now]
            close(late or list(strangers)[: max(0, len(strangers) - _MOST_STRANGERS)])


def _left(end: float) -> float:
    """A timeout for a socket, for which zero means something else."""
    return max(_SHORTEST_S, end - time.monotonic())
