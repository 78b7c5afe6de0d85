"""Small messages between ranks over sockets of their own, read by the thread that waits for them.

gloo hands a message to a thread that sends it, from one that hears of it back to that one, and on to whoever waits: 240
microseconds for what takes 15 here. On a machine whose processors sleep every hand-over costs more.
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
from contextlib import contextmanager, suppress
from typing import Self

import msgspec

from weight_sync.errors import DeadlineExceeded, ProtocolError, TransportError
from weight_sync.time_left import left_s

from .stateless_process_group import StatelessProcessGroup

LARGEST_BYTES = 16 << 10
"""What the buffers of every connection take, so that all may send before any reads."""
_TOKEN_BYTES = 32
_HELLO = struct.Struct(f"<I{_TOKEN_BYTES}s")
_LENGTH = struct.Struct("<Q")
_MOST_BYTES = 1 << 30
_PIECE_BYTES = 1 << 20
_TAKEN = b"\x01"
_HELLO_S = 2.0
"""How long somebody may take to say who it is."""
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
    `TransportError`; the mesh is of no more use then.
    """

    def __init__(self, rank: int, name: str, peers: dict[int, socket.socket]) -> None:
        self._rank = rank
        self._name = name
        self._peers = peers
        self._lock = threading.Lock()
        self._busy = False
        self._closed = False

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
                while len(peers) < meeting.size - 1:
                    listener.settimeout(_left(end))
                    connection, _ = listener.accept()
                    rank = _who(connection, token, end)
                    if not meeting.rank < rank < meeting.size or rank in peers:
                        connection.close()  # whoever it is
                        continue
                    peers[rank] = connection
        except OSError as error:
            for connection in peers.values():
                connection.close()
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
            for rank in self._peers:
                self._send(rank, data, end)
            found = {self._rank: data, **self._receive_from_all(len(data), end)}
        return [found[rank] for rank in sorted(found)]

    def broadcast(self, data: bytes | None, src: int, *, timeout_s: float) -> bytes:
        """`data` of rank `src`, of any length, on all ranks; `src` returns when all have it."""
        end = time.monotonic() + timeout_s
        with self._using("a broadcast"):
            if self._rank != src:
                (length,) = _LENGTH.unpack(self._receive(src, _LENGTH.size, end))
                if length > _MOST_BYTES:
                    raise ProtocolError(
                        f"group {self._name!r}: got a message of {length} bytes from rank {src}, expected at most "
                        f"{_MOST_BYTES}; have all ranks call the same methods in the same order"
                    )
                found = self._receive(src, length, end)
                self._send(src, _TAKEN, end)
                return found
            assert data is not None, "the source passes it"
            message = _LENGTH.pack(len(data)) + data
            for rank in self._peers:
                self._send(rank, message, end)
            self._receive_from_all(len(_TAKEN), end)
            return data

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
            if self._closed:
                raise TransportError(
                    f"group {self._name!r}: got {what} after it was closed, expected an open group; make a new one"
                )
            self._busy = True
        try:
            yield
        finally:
            with self._lock:
                self._busy = False
                closed = self._closed
            if closed:
                self.close()

    def _send(self, rank: int, data: bytes, end: float) -> None:
        try:
            self._peers[rank].settimeout(_left(end))
            self._peers[rank].sendall(data)
        except OSError as error:
            raise self._error("a message to", rank, error) from error

    def _receive(self, rank: int, num_bytes: int, end: float) -> bytes:
        data = bytearray()
        while len(data) < num_bytes:
            data += self._more(rank, num_bytes - len(data), end)
        return bytes(data)

    def _receive_from_all(self, num_bytes: int, end: float) -> dict[int, bytes]:
        """From whoever has something, so that the end of one is known while another is late."""
        found = {rank: bytearray() for rank in self._peers}
        late = {peer.fileno(): rank for rank, peer in self._peers.items()} if num_bytes else {}
        waits = select.poll()
        for descriptor in late:
            waits.register(descriptor, select.POLLIN)
        while late:
            ready = waits.poll(1e3 * _left(end))
            if not ready:
                raise self._error("a message from", min(late.values()), TimeoutError())
            for descriptor, _ in ready:
                rank = late[descriptor]
                found[rank] += self._more(rank, num_bytes - len(found[rank]), end)
                if len(found[rank]) == num_bytes:
                    waits.unregister(descriptor)
                    del late[descriptor]
        return {rank: bytes(data) for rank, data in found.items()}

    def _more(self, rank: int, num_bytes: int, end: float) -> bytes:
        """Some of so many bytes."""
        try:
            self._peers[rank].settimeout(_left(end))
            more = self._peers[rank].recv(min(num_bytes, _PIECE_BYTES))
            if not more:
                raise ConnectionResetError("the end of the connection")
            return more
        except OSError as error:
            raise self._error("a message from", rank, error) from error

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


def _who(connection: socket.socket, token: bytes, end: float) -> int:
    """The rank that says that it is at the other end; -1: somebody else."""
    data = b""
    try:
        connection.settimeout(min(_HELLO_S, _left(end)))
        while len(data) < _HELLO.size:
            more = connection.recv(_HELLO.size - len(data))
            if not more:
                return -1
            data += more
    except OSError:
        return -1
    rank, said = _HELLO.unpack(data)
    return int(rank) if hmac.compare_digest(said, token) else -1


def _left(end: float) -> float:
    """A timeout for a socket, for which zero means something else."""
    return max(_SHORTEST_S, end - time.monotonic())
