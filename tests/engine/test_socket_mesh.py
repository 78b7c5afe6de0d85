"""Small messages between ranks over sockets of their own: what arrives, who is let in, and how waiting ends."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from rollout.distributed import socket_mesh
from rollout.distributed.group_coordinator import GroupCoordinator
from rollout.distributed.socket_mesh import LARGEST_BYTES, SocketMesh
from rollout.distributed.stateless_process_group import StatelessProcessGroup
from weight_sync.errors import DeadlineExceeded, ProtocolError, TransportError
from weight_sync.process_groups.communicator import Communicator
from weight_sync.process_groups.rendezvous import StoreServer

SIZE = 3


class Ranks:
    """Threads of this process that meet, and what each of them made."""

    def __init__(self, make: Callable[[StatelessProcessGroup], Any], name: str = "mesh") -> None:
        self.server = StoreServer(timeout_s=20)
        self.pool = ThreadPoolExecutor(SIZE)

        def meet(rank: int) -> Any:
            meeting = StatelessProcessGroup.create(
                *("127.0.0.1", self.server.port, rank, SIZE), name=name, timeout_s=20, served=True
            )
            try:
                return make(meeting)
            finally:
                meeting.close()

        self.made = list(self.pool.map(meet, range(SIZE)))

    def all(self, call: Callable[[Any], Any]) -> list[Any]:
        return list(self.pool.map(call, self.made))


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    ranks = Ranks(lambda meeting: SocketMesh.open(meeting, timeout_s=20))
    yield ranks
    for mesh in ranks.made:
        mesh.close()
    ranks.pool.shutdown()
    ranks.server.close()


@pytest.mark.parametrize("length", [0, 1, LARGEST_BYTES])
def test_every_rank_gets_what_every_rank_has_in_their_order(ranks: Ranks, length: int) -> None:
    expected = [bytes([65 + rank]) * length for rank in range(SIZE)]
    for _ in range(3):
        found = ranks.all(lambda mesh: mesh.all_gather(expected[mesh._rank], timeout_s=20))
        assert found == [expected] * SIZE


@pytest.mark.parametrize("length", [0, 5, 3 << 20])
def test_what_one_rank_tells_arrives_on_all_whatever_its_length(ranks: Ranks, length: int) -> None:
    data = bytes(range(256)) * (length // 256) + bytes(length % 256)
    for src in range(SIZE):

        def tell(mesh: SocketMesh, src: int = src) -> bytes:
            return mesh.broadcast(data if mesh._rank == src else None, src, timeout_s=20)

        assert ranks.all(tell) == [data] * SIZE
    assert ranks.all(lambda mesh: mesh.all_gather(b"x", timeout_s=20)) == [[b"x"] * SIZE] * SIZE


def test_whoever_tells_goes_on_when_all_have_heard(ranks: Ranks) -> None:
    heard = [threading.Event() for _ in range(SIZE)]

    def run(mesh: SocketMesh) -> bool:
        if mesh._rank:
            time.sleep(0.2 * mesh._rank)
            heard[mesh._rank].set()
        mesh.broadcast(b"now" if mesh._rank == 0 else None, 0, timeout_s=20)
        return all(event.is_set() for event in heard[1:])

    assert ranks.all(run)[0]


def test_a_rank_that_does_not_come_is_waited_for_until_the_deadline(ranks: Ranks) -> None:
    start = time.monotonic()
    with pytest.raises(DeadlineExceeded, match="from rank 1: got no end of it by its deadline"):
        ranks.made[0].all_gather(b"alone", timeout_s=0.3)
    assert 0.3 <= time.monotonic() - start < 10
    with pytest.raises(DeadlineExceeded, match="from rank 1"):
        ranks.made[2].broadcast(None, 1, timeout_s=0.1)


def test_a_rank_that_leaves_is_noticed_at_once(ranks: Ranks) -> None:
    waiting = ranks.pool.submit(ranks.made[0].all_gather, b"alone", timeout_s=60)
    time.sleep(0.1)
    ranks.made[1].close()
    with pytest.raises(TransportError, match="rank 1 failed"):
        waiting.result(20)


def test_closing_ends_a_call_of_another_thread(ranks: Ranks) -> None:
    mesh = ranks.made[0]
    waiting = ranks.pool.submit(mesh.broadcast, None, 1, timeout_s=60)
    time.sleep(0.1)
    mesh.close()
    with pytest.raises(TransportError):
        waiting.result(20)
    assert all(connection.fileno() == -1 for connection in mesh._peers.values())
    mesh.close()
    with pytest.raises(TransportError, match="after it was closed"):
        mesh.all_gather(b"", timeout_s=1)


def test_a_length_that_nobody_sends_is_refused(ranks: Ranks) -> None:
    head = socket_mesh._HEAD.pack(socket_mesh._KINDS + socket_mesh._TOLD, 1 << 40)
    ranks.made[0]._peers[1].sendall(head)
    with pytest.raises(ProtocolError, match="expected at most"):
        ranks.made[1].broadcast(None, 0, timeout_s=20)


def test_nobody_reads_for_others_to_send(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine whose sockets have small buffers, all send at once what no buffer takes."""
    serve = socket.create_server

    def small(connection: socket.socket) -> socket.socket:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        return connection

    def connect(address: tuple[str, int], timeout: float) -> socket.socket:
        connection = small(socket.socket())  # Before it is told how much it may be sent.
        connection.settimeout(timeout)
        connection.connect(address)
        return connection

    monkeypatch.setattr(socket, "create_server", lambda *a, **o: small(serve(*a, **o)))

    def open_small(meeting: StatelessProcessGroup) -> SocketMesh:
        monkeypatch.setattr(socket, "create_connection", connect)
        return SocketMesh.open(meeting, timeout_s=20)

    ranks = Ranks(open_small)
    try:
        parts = [bytes([65 + rank]) * LARGEST_BYTES for rank in range(SIZE)]
        found = ranks.all(lambda mesh: mesh.all_gather(parts[mesh._rank], timeout_s=20))
        assert found == [parts] * SIZE
    finally:
        for mesh in ranks.made:
            mesh.close()
        ranks.pool.shutdown()
        ranks.server.close()


def test_after_a_call_that_failed_nobody_takes_its_answers_for_those_of_the_next(
    ranks: Ranks,
) -> None:
    mesh = ranks.made[0]
    with pytest.raises(DeadlineExceeded):
        mesh.all_gather(b"first", timeout_s=0.1)
    with pytest.raises(DeadlineExceeded):
        ranks.made[1].all_gather(b"FIRST", timeout_s=0.1)
    assert ranks.made[2].all_gather(b"frist", timeout_s=20) == [b"first", b"FIRST", b"frist"]
    with pytest.raises(TransportError, match="after a call failed"):
        mesh.all_gather(b"again", timeout_s=20)


def test_other_calls_of_another_rank_are_not_taken_for_ours(ranks: Ranks) -> None:
    def call(mesh: SocketMesh) -> Any:
        if mesh._rank == 0:
            return mesh.all_gather(bytes(8), timeout_s=20)
        if mesh._rank == 1:
            return mesh.broadcast(b"short", 1, timeout_s=20)
        mesh.broadcast(None, 1, timeout_s=20)
        return mesh.all_gather(bytes(8), timeout_s=20)

    start = time.monotonic()
    calls = [ranks.pool.submit(call, mesh) for mesh in ranks.made]
    for rank, other in (
        (0, "1"),
        (1, "0"),
        (2, "[01]"),
    ):  # Whoever rank 2 looks at is closed by then.
        with pytest.raises((ProtocolError, TransportError), match=f"rank {other}") as caught:
            calls[rank].result(30)
        if rank < 2:
            assert caught.type is ProtocolError and "in the same order" in str(caught.value)
        ranks.made[rank].close()
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("drips", [False, True])
def test_strangers_keep_no_rank_waiting(monkeypatch: pytest.MonkeyPatch, drips: bool) -> None:
    """However many they are, and however slowly they say what they have to say."""
    serve = socket.create_server
    strangers: list[socket.socket] = []
    over = threading.Event()

    def besieged(*arguments: Any, **options: Any) -> socket.socket:
        listener = serve(*arguments, **options)
        if threading.current_thread() is not threading.main_thread():
            for _ in range(2 if drips else socket_mesh._MOST_STRANGERS + 16):
                strangers.append(socket.create_connection(listener.getsockname()))
        return listener

    def drip() -> None:
        while drips and not over.wait(0.1):
            for stranger in strangers:
                with contextlib.suppress(OSError):
                    stranger.send(b"\0")

    monkeypatch.setattr(socket, "create_server", besieged)
    dripping = threading.Thread(target=drip)
    dripping.start()
    start = time.monotonic()
    ranks = Ranks(lambda meeting: SocketMesh.open(meeting, timeout_s=20))
    try:
        assert time.monotonic() - start < 1.5
        assert ranks.all(lambda mesh: mesh.all_gather(b"x", timeout_s=20)) == [[b"x"] * SIZE] * SIZE
    finally:
        over.set()
        dripping.join()
        for connection in [*ranks.made, *strangers]:
            connection.close()
        ranks.pool.shutdown()
        ranks.server.close()


def test_strangers_are_not_let_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither who says nothing, nor who does not know the token, nor who has none but a rank's number."""
    monkeypatch.setattr(socket_mesh, "_HELLO_S", 0.2)
    serve = socket.create_server
    strangers: list[socket.socket] = []

    def besieged(*arguments: Any, **options: Any) -> socket.socket:
        listener = serve(*arguments, **options)
        if threading.current_thread() is threading.main_thread():
            return listener  # the store's
        for words in (b"", b"\x02\0\0\0", b"\x02\0\0\0" + bytes(32), b"GET / HTTP/1.1\r\n" * 4):
            stranger = socket.create_connection(listener.getsockname())
            stranger.sendall(words)
            strangers.append(stranger)
        return listener

    monkeypatch.setattr(socket, "create_server", besieged)
    ranks = Ranks(lambda meeting: SocketMesh.open(meeting, timeout_s=20))
    assert ranks.all(lambda mesh: mesh.all_gather(b"x", timeout_s=20)) == [[b"x"] * SIZE] * SIZE
    for mesh in ranks.made:
        mesh.close()
    for stranger in strangers:
        stranger.close()
    ranks.pool.shutdown()
    ranks.server.close()


def test_a_rank_that_never_connects_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    connect = socket.create_connection

    def connect_or_not(*arguments: Any, **options: Any) -> socket.socket:
        if threading.current_thread().name == "rank 2":
            raise ConnectionRefusedError("a test says so")
        return connect(*arguments, **options)

    def make(meeting: StatelessProcessGroup) -> str:
        threading.current_thread().name = f"rank {meeting.rank}"
        try:
            SocketMesh.open(meeting, timeout_s=1.0)
        except (DeadlineExceeded, TransportError) as error:
            return f"{type(error).__name__}: {error}"
        return "connected"

    monkeypatch.setattr(socket, "create_connection", connect_or_not)
    ranks = Ranks(make)
    assert all("DeadlineExceeded" in text and "from ranks [2]" in text for text in ranks.made[:2])
    assert "TransportError" in ranks.made[2] and "a test says so" in ranks.made[2]
    ranks.pool.shutdown()
    ranks.server.close()


def test_objects_and_bytes_of_a_quick_group_travel_whatever_their_size() -> None:
    ranks = Ranks(lambda meeting: GroupCoordinator.create(meeting, timeout_s=20, quick=True))
    try:
        for length in (0, 100, LARGEST_BYTES + 1):
            parts = [bytes([rank]) * length for rank in range(SIZE)]
            assert (
                ranks.all(lambda g, parts=parts: g.all_gather_bytes(parts[g.rank])) == [parts] * 3
            )
            text = "x" * length
            told = ranks.all(
                lambda g, text=text: g.broadcast_object(text if g.rank == 1 else None, 1, type=str)
            )
            assert told == [text] * SIZE
        with pytest.raises(ProtocolError, match="cannot read an object"):
            for found in [
                ranks.pool.submit(group.broadcast_object, 7, 0, type=str) for group in ranks.made
            ]:
                found.result(20)
    finally:
        for group in ranks.made:
            group.destroy()
        ranks.pool.shutdown()
        ranks.server.close()


def test_what_was_opened_for_a_group_that_fails_is_closed_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever keeps the error: else the others would wait for this rank until their deadlines."""
    closed: list[Any] = []
    close = Communicator.close
    monkeypatch.setattr(Communicator, "close", lambda self: (closed.append(self), close(self)))

    def make(meeting: StatelessProcessGroup) -> TransportError:
        with pytest.raises(TransportError, match="a test says so") as caught:
            GroupCoordinator.create(meeting, timeout_s=20, quick=True)
        return caught.value

    def fail(*_: Any, **__: Any) -> Any:
        raise TransportError("a test says so")

    monkeypatch.setattr(SocketMesh, "open", fail)
    ranks = Ranks(make)
    assert len({*closed}) == SIZE
    ranks.pool.shutdown()
    ranks.server.close()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "[::1]"])
def test_the_rank_that_serves_the_rendezvous_listens_at_its_address(host: str) -> None:
    bare = host.strip("[]")
    try:
        with socket.create_server(
            (bare, 0), family=socket.AF_INET6 if ":" in bare else socket.AF_INET
        ) as free:
            port = free.getsockname()[1]
    except OSError:
        pytest.skip("this machine has no such address")
    done = threading.Barrier(SIZE)

    def exchange(rank: int) -> list[bytes]:
        with StatelessProcessGroup.create(host, port, rank, SIZE, name="at", timeout_s=20) as group:
            mesh = SocketMesh.open(group, timeout_s=20)
            try:
                return mesh.all_gather(bytes([rank]), timeout_s=20)
            finally:
                done.wait(20)
                mesh.close()

    with ThreadPoolExecutor(SIZE) as pool:
        assert list(pool.map(exchange, range(SIZE))) == [[b"\0", b"\1", b"\2"]] * SIZE
