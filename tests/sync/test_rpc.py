"""Remote calls: ids, deadlines, order, errors that keep their type, and servers that nothing kills."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sync_support import eventually, num_descriptors

from weight_sync.errors import (
    ERRORS,
    DeadlineExceeded,
    EngineDiedError,
    ManifestMismatch,
    ProtocolError,
    RemoteError,
)
from weight_sync.wire.keys import Address
from weight_sync.wire.rpc import Call, RpcClient, RpcServer
from weight_sync.wire.rpc_wire import PROTOCOL_VERSION, ReplyHeader, RequestHeader


class Echo(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    text: str
    delay_s: float = 0.0
    num_chunks: int = 0
    num_bytes: int = 0


class Fail(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    how: str


class Answer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    text: str


LATE: list[threading.Timer] = []
"""Answers that a test's server may still give."""


def handler(call: Call) -> None:
    if isinstance(call.body, Fail):
        if call.body.how == "typed":
            raise ManifestMismatch("the tensor is wrong")
        if call.body.how == "late answer":
            call.fail(ManifestMismatch("first"))
            call.reply(Answer(text="second"))
            return
        raise ZeroDivisionError("a bug")
    body: Echo = call.body

    def answer() -> None:
        for i in range(body.num_chunks):
            call.stream(Answer(text=str(i)))
        call.reply(Answer(text=body.text + "x" * body.num_bytes))

    if body.delay_s:
        late = threading.Timer(body.delay_s, answer)
        late.start()
        LATE.append(late)
    else:
        answer()


@pytest.fixture(params=["ipc", "tcp", "tcp with keys"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RpcServer]:
    binds = {
        "tcp": "tcp://127.0.0.1:0",
        "tcp with keys": f"tcp://127.0.0.1:0?key_file={tmp_path}/key",
    }
    bind = binds.get(request.param)
    server = RpcServer(handler, Echo | Fail, bind=bind, max_message_bytes=1 << 20)
    server.start()
    yield server
    server.close()
    while LATE:
        LATE.pop().cancel()


@pytest.fixture
def client(server: RpcServer) -> Iterator[RpcClient]:
    client = connect(server.address)
    yield client
    client.close()


def connect(address: str, **options: Any) -> RpcClient:
    return RpcClient(address, Answer, errors=ERRORS, max_message_bytes=1 << 20, **options)


def test_a_thousand_calls_from_eight_threads_each_get_their_own_reply(client: RpcClient) -> None:
    def one(i: int) -> bool:
        return client.call(Echo(text=str(i), delay_s=0.001 * (i % 7 == 0)), 10.0).text == str(i)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(one, range(1000)))


def test_chunks_arrive_in_order_and_before_the_answer(client: RpcClient) -> None:
    chunks: list[int] = []
    future = client.submit(
        Echo(text="end", num_chunks=500), 10.0, lambda chunk: chunks.append(int(chunk.text))
    )
    assert future.result().text == "end"
    assert chunks == list(range(500))


def test_a_missed_deadline_raises_in_time_and_the_late_reply_reaches_nobody(
    client: RpcClient,
) -> None:
    start = time.monotonic()
    with pytest.raises(DeadlineExceeded, match=r"Echo was not answered within 0.050 s"):
        client.call(Echo(text="late", delay_s=3.0), 0.05)
    assert time.monotonic() - start < 2.9
    i = 0
    while time.monotonic() - start < 3.2:
        i += 1
        assert client.call(Echo(text=str(i), delay_s=0.01), 60.0).text == str(i)


@pytest.mark.parametrize("timeout_s", [0, -1, float("nan"), float("inf"), None])
def test_a_call_without_a_deadline_that_comes_is_refused(client: RpcClient, timeout_s: Any) -> None:
    with pytest.raises(ValueError, match="every remote call has a deadline"):
        client.call(Echo(text="x"), timeout_s)


def test_known_errors_keep_their_type_and_others_are_named(client: RpcClient) -> None:
    with pytest.raises(ManifestMismatch, match="the tensor is wrong"):
        client.call(Fail(how="typed"), 60.0)
    with pytest.raises(RemoteError, match="ZeroDivisionError: a bug"):
        client.call(Fail(how="bug"), 60.0)
    with pytest.raises(ManifestMismatch, match="first"):
        client.call(Fail(how="late answer"), 60.0)
    assert client.call(Echo(text="alive"), 60.0).text == "alive"


def test_a_callback_that_raises_fails_its_own_call_alone(client: RpcClient) -> None:
    def broken(_: Answer) -> None:
        raise KeyError("callback")

    with pytest.raises(KeyError):
        client.submit(Echo(text="x", num_chunks=3), 5.0, broken).result()
    assert client.call(Echo(text="alive"), 60.0).text == "alive"


def test_messages_that_are_too_large_are_refused_on_either_side(client: RpcClient) -> None:
    with pytest.raises(ProtocolError, match="Echo is too large"):
        client.call(Echo(text="x" * (1 << 20)), 60.0)
    with pytest.raises(ProtocolError, match="the reply is too large"):
        client.call(Echo(text="x", num_bytes=1 << 20), 60.0)
    assert client.call(Echo(text="alive"), 60.0).text == "alive"


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"type": "Echo"}, "text"),
        ({"type": "Echo", "text": 3}, r"\$\.text"),
        ({"type": "Echo", "text": "x", "surprise": 1}, "surprise"),
        ({"type": "Nothing"}, "Nothing"),
        ([1, 2], "object"),
    ],
)
def test_a_wrong_field_is_answered_with_its_name(client: RpcClient, body: Any, field: str) -> None:
    with pytest.raises(ProtocolError, match=field):
        client.call(body, 60.0)


def test_another_protocol_version_is_refused(server: RpcServer) -> None:
    header = RequestHeader(protocol=PROTOCOL_VERSION + 1, id=7, timeout_s=1.0)
    reply = raw(server.address, [msgspec.msgpack.encode(header), b""], wait=True)
    assert msgspec.msgpack.decode(reply[0], type=ReplyHeader).kind == "error"
    assert b"protocol versions differ" in reply[1]


def raw(address: str, frames: list[bytes], *, wait: bool = False) -> list[bytes]:
    """Send frames as they are."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.setsockopt(zmq.LINGER, 500)
        place = Address.of_client(address)
        keys = place.client_keys()
        if keys is not None:
            keys.apply(dealer)
        dealer.connect(place.endpoint)
        dealer.send_multipart(frames)
        if wait:
            assert dealer.poll(5000)
            return dealer.recv_multipart()
    return []


@pytest.fixture(scope="module")
def fuzzed() -> Iterator[tuple[RpcServer, zmq.Socket[bytes], RpcClient]]:
    server = RpcServer(handler, Echo | Fail)
    server.start()
    context = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.connect(server.address)
    client = RpcClient(server.address, Answer, errors=ERRORS)
    yield server, dealer, client
    client.close()
    context.destroy(linger=0)
    server.close()


HEADER = msgspec.msgpack.encode(RequestHeader(protocol=PROTOCOL_VERSION, id=1, timeout_s=1.0))
BODY = msgspec.msgpack.encode(Echo(text="hello"))


@st.composite
def mutated(draw: st.DrawFn, valid: bytes) -> bytes:
    data = bytearray(valid)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data) - 1))
        data[at] = draw(st.integers(0, 255))
    return bytes(data[: draw(st.integers(0, len(data)))])


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    frames=st.lists(st.binary(max_size=200), min_size=1, max_size=4)
    | st.tuples(mutated(HEADER), mutated(BODY)).map(list)
    | st.tuples(st.just(HEADER), mutated(BODY) | st.binary(max_size=300)).map(list)
)
def test_no_bytes_kill_the_server(
    fuzzed: tuple[RpcServer, zmq.Socket[bytes], RpcClient], frames: list[bytes]
) -> None:
    _, dealer, client = fuzzed
    dealer.send_multipart(frames)
    while dealer.poll(0):
        dealer.recv_multipart()
    assert client.call(Echo(text="alive"), 60.0).text == "alive"


class HostileServer:
    """Answers with `frames` whatever is asked; honestly while there are none."""

    def __init__(self) -> None:
        self.frames: list[bytes] = []
        self.context = zmq.Context()
        self.router = self.context.socket(zmq.ROUTER)
        port = self.router.bind_to_random_port("tcp://127.0.0.1")
        self.client = connect(f"tcp://127.0.0.1:{port}")
        self.closing = False
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def run(self) -> None:
        while not self.closing:
            if not self.router.poll(20):
                continue
            to, header, _ = self.router.recv_multipart()
            asked = msgspec.msgpack.decode(header, type=RequestHeader)
            kind = "reply" if asked.id else "clock"
            clock = time.monotonic()
            reply = ReplyHeader(protocol=PROTOCOL_VERSION, id=asked.id, kind=kind, clock=clock)
            honest = [
                msgspec.msgpack.encode(reply),
                msgspec.msgpack.encode(Answer(text="honest")),
            ]
            self.router.send_multipart([to, *(self.frames or honest)])

    def close(self) -> None:
        self.closing = True
        self.thread.join()
        self.client.close()
        self.context.destroy(linger=0)


@pytest.fixture(scope="module")
def hostile() -> Iterator[HostileServer]:
    server = HostileServer()
    yield server
    server.close()


@settings(max_examples=100, deadline=None)
@given(
    frames=st.lists(st.binary(max_size=100), min_size=1, max_size=3)
    | st.tuples(
        mutated(msgspec.msgpack.encode(ReplyHeader(protocol=1, id=1, kind="reply"))),
        mutated(msgspec.msgpack.encode(Answer(text="x"))),
    ).map(list)
)
def test_no_reply_hangs_a_client(hostile: HostileServer, frames: list[bytes]) -> None:
    hostile.frames = frames
    start = time.monotonic()
    with contextlib.suppress(DeadlineExceeded, ProtocolError):
        hostile.client.call(Echo(text="x"), 0.02)
    assert time.monotonic() - start < 20.0
    hostile.frames = []
    assert hostile.client.call(Echo(text="x"), 60.0).text == "honest"


@pytest.mark.parametrize(
    "noise",
    [
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(64),
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        os.urandom(4096),
        b"\xff" + bytes(8) + b"\x7f" + os.urandom(200),
    ],
    ids=["http2", "http1", "random", "zmtp"],
)
def test_foreign_protocols_on_the_port_are_harmless(noise: bytes) -> None:
    server = RpcServer(handler, Echo | Fail, bind="tcp://127.0.0.1:0")
    server.start()
    host, port = server.address.removeprefix("tcp://").split(":")
    for _ in range(3):
        with socket.create_connection((host, int(port)), timeout=5) as connection:
            connection.sendall(noise)
            connection.settimeout(0.05)
            try:
                connection.recv(100)
            except OSError:
                pass
    client = connect(server.address)
    assert client.call(Echo(text="alive"), 60.0).text == "alive"
    client.close()
    server.close()


def test_a_frame_beyond_the_limit_ends_that_connection_alone(server: RpcServer) -> None:
    client = connect(server.address)
    raw(server.address, [HEADER, bytes(2 << 20)])
    assert client.call(Echo(text="alive"), 60.0).text == "alive"
    client.close()


def test_pending_and_later_calls_fail_at_once_when_the_server_goes(server: RpcServer) -> None:
    client = connect(server.address)
    client.call(Echo(text="x"), 60.0)
    futures = [client.submit(Echo(text="x", delay_s=30.0 * i), 60.0) for i in (1, 2)]
    time.sleep(0.05)
    start = time.monotonic()
    server.close()
    for future in futures:
        with pytest.raises(EngineDiedError, match="was lost"):
            future.result(20)
    with pytest.raises(EngineDiedError):
        client.call(Echo(text="x"), 60.0)
    assert time.monotonic() - start < 20.0
    assert client.dead is not None
    client.close()


def test_a_peer_that_is_known_to_be_dead_fails_its_calls_with_the_reason(server: RpcServer) -> None:
    reason: list[str] = []
    client = connect(server.address, liveness=lambda: reason[0] if reason else None)
    future = client.submit(Echo(text="x", delay_s=30.0), 60.0)
    time.sleep(0.05)
    reason.append("the engine's process ended with code 9")
    with pytest.raises(EngineDiedError, match="code 9"):
        future.result(60)
    client.close()


def test_an_address_where_nobody_listens_fails_within_the_connect_timeout() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        client = connect(f"tcp://127.0.0.1:{taken.getsockname()[1]}", connect_timeout_s=0.2)
        start = time.monotonic()
        with pytest.raises(EngineDiedError, match="nobody answers at"):
            client.call(Echo(text="x"), 30.0)
        assert time.monotonic() - start < 20.0
        client.close()
    with pytest.raises(ValueError, match="not an address"):
        connect("somewhere")


def test_a_client_may_connect_before_its_server_exists(tmp_path: Any) -> None:
    address = f"ipc://{tmp_path}/socket"
    client = connect(address)
    future: Future[Answer] = client.submit(Echo(text="early"), 10.0)
    time.sleep(0.1)
    server = RpcServer(handler, Echo | Fail, bind=address)
    server.start()
    assert future.result().text == "early"
    client.close()
    server.close()


def test_closing_gives_back_descriptors_threads_and_the_socket_folder() -> None:
    def once() -> str:
        server = RpcServer(handler, Echo | Fail)
        server.start()
        client = connect(server.address)
        assert client.call(Echo(text="x"), 60.0).text == "x"
        folder = os.path.dirname(server.address.removeprefix("ipc://"))
        assert os.stat(folder).st_mode & 0o777 == 0o700
        client.close()
        server.close()
        client.close()
        server.close()
        return folder

    once()
    descriptors, threads = num_descriptors(), threading.active_count()
    folders = [once() for _ in range(5)]
    assert not any(os.path.exists(folder) for folder in folders)
    assert eventually(lambda: num_descriptors() <= descriptors)
    assert eventually(lambda: threading.active_count() <= threads)


def test_a_call_that_the_caller_cancelled_is_dropped(client: RpcClient) -> None:
    future = client.submit(Echo(text="x", delay_s=0.05), 60.0)
    assert future.cancel()
    time.sleep(0.1)
    assert client.call(Echo(text="alive"), 60.0).text == "alive"


def test_the_last_reply_before_a_server_closes_still_arrives() -> None:
    for _ in range(20):
        arrived: list[Call] = []
        came = threading.Event()

        def keep(call: Call, arrived: list[Call] = arrived, came: threading.Event = came) -> None:
            arrived.append(call)
            came.set()

        server = RpcServer(keep, Echo | Fail)
        server.start()
        client = connect(server.address)
        future = client.submit(Fail(how="never"), 10.0)
        assert came.wait(10)
        arrived[0].reply(Answer(text="bye"))
        server.close()
        assert future.result(10).text == "bye"
        client.close()
