"""Deadlines that both ends understand, connections that outlive a stop, forked children, and what a server survives."""

from __future__ import annotations

import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st
from stopped import go_on, stop
from sync_support import FOLDER, Child, collect, eventually, read_line, weights

from weight_sync.errors import (
    ERRORS,
    AddressInUseError,
    ConnectionLostError,
    DeadlineExceeded,
    ForkedProcessError,
    SyncError,
)
from weight_sync.publisher.publisher import WeightPublisher
from weight_sync.wire import process as processes
from weight_sync.wire import rpc_wire
from weight_sync.wire.deadline import PeerClock
from weight_sync.wire.listening import check_free
from weight_sync.wire.rpc import Call, RpcClient, RpcServer
from weight_sync.wire.rpc_wire import PROTOCOL_VERSION, RequestHeader


class Ask(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    text: str


class Say(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    text: str


@pytest.fixture
def heard() -> list[str]:
    return []


@pytest.fixture
def make_server(heard: list[str]) -> Iterator[Callable[..., RpcServer]]:
    made: list[RpcServer] = []

    def handler(call: Call) -> None:
        heard.append(call.body.text)
        if call.body.text != "keep":
            call.reply(Say(text=call.body.text))

    def make(**options: Any) -> RpcServer:
        made.append(RpcServer(handler, Ask, **options))
        made[-1].start()
        return made[-1]

    yield make
    for server in made:
        server.close()


@pytest.fixture
def make_client() -> Iterator[Callable[..., RpcClient]]:
    made: list[RpcClient] = []

    def make(address: str, **options: Any) -> RpcClient:
        made.append(RpcClient(address, Say, errors=ERRORS, **options))
        return made[-1]

    yield make
    for client in made:
        client.close()


# ---- deadlines
# ---------------------------------------------------------------------------------------------------------


@given(
    offset=st.floats(-1e6, 1e6),
    replies=st.lists(
        st.tuples(st.floats(0, 100), st.floats(0, 20), st.floats(0, 20)), min_size=1, max_size=20
    ),
    later=st.floats(0, PeerClock.FRESH_S),
)
def test_a_peers_clock_is_never_believed_to_show_more_than_it_does(
    offset: float, replies: list[tuple[float, float, float]], later: float
) -> None:
    clock, now, last_delay = PeerClock(), 0.0, 0.0
    for gap, way_there, way_back in replies:
        now += gap + way_there + way_back
        last_delay = way_back
        clock.note(now - way_back + offset, now)
    shown = clock.at(now + later)
    assert shown <= now + later + offset + 1e-6
    assert shown >= now + later + offset - last_delay - 1e-6  # at least as good as the last reply
    assert not clock.is_fresh(now + PeerClock.FRESH_S + 1)  # clocks drift


def test_a_call_that_is_read_after_its_deadline_is_not_carried_out(
    make_server: Callable[..., RpcServer], heard: list[str]
) -> None:
    server = make_server()
    header = RequestHeader(
        protocol=PROTOCOL_VERSION, id=1, timeout_s=60.0, deadline=time.monotonic() - 0.01
    )
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.linger = 0
        dealer.connect(server.address)
        dealer.send_multipart(
            [msgspec.msgpack.encode(header), msgspec.msgpack.encode(Ask(text="late"))]
        )
        assert dealer.poll(5000)
        assert b"DeadlineExceeded" in dealer.recv_multipart()[1]
    assert heard == []


def test_a_client_says_nothing_before_it_knows_the_servers_clock(
    make_client: Callable[..., RpcClient],
) -> None:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.linger = 0
        port = router.bind_to_random_port("tcp://127.0.0.1")
        client = make_client(f"tcp://127.0.0.1:{port}")
        future = client.submit(Ask(text="x"), 0.3)
        assert router.poll(5000)
        _, header, body = router.recv_multipart()
        assert msgspec.msgpack.decode(header, type=RequestHeader).id == rpc_wire.CLOCK_ID
        assert body == b""
        with pytest.raises(DeadlineExceeded):
            future.result(60)
        assert not router.poll(100)


@pytest.fixture
def stopped(child: Callable[..., Any]) -> Iterator[tuple[Any, str]]:
    """A toy engine in a process of its own that a test may stop; it goes on afterwards, or it could not be ended."""
    process = child("engine_process.py")
    address = read_line(process)
    yield process, address
    go_on(process.pid)


def test_a_commit_whose_caller_gave_up_while_the_engine_was_stopped_is_never_carried_out(
    stopped: tuple[Any, str],
) -> None:
    process, address = stopped
    with WeightPublisher(address, timeout_s=60.0) as publisher:
        publisher.publish(weights(1.0))

        def tensors() -> Iterator[Any]:
            stop(process.pid)  # the session is open
            yield from weights(2.0).items()

        with pytest.raises(DeadlineExceeded):
            publisher.publish(tensors(), timeout_s=1.0)
        go_on(process.pid)
        assert eventually(lambda: _asks_free(publisher), timeout_s=60.0)
        process.stdin.write("state\n")
        process.stdin.flush()
        state = msgspec.json.decode(read_line(process))
        assert (state["version"], state["values"], state["mixtures"]) == (1, [1.0], [])
        assert publisher.publish(weights(3.0)).version == 2


def _asks_free(publisher: WeightPublisher) -> bool:
    try:
        publisher.begin()
    except SyncError:
        return False
    publisher.abort()
    return True


# ---- stops and lost connections
# ----------------------------------------------------------------------------------------


def test_a_server_that_was_stopped_for_longer_than_any_heartbeat_goes_on(
    stopped: tuple[Any, str],
    make_client: Callable[..., RpcClient],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rpc_wire, "HEARTBEAT_INTERVAL_MS", 50)
    monkeypatch.setattr(rpc_wire, "HEARTBEAT_TIMEOUT_MS", 200)
    process, address = stopped
    with WeightPublisher(address, timeout_s=20.0) as publisher:
        publisher.publish(weights(1.0))
        stop(process.pid)
        threading.Timer(0.8, go_on, (process.pid,)).start()
        assert publisher.publish(weights(2.0)).version == 2


def test_a_lost_connection_to_a_living_peer_is_made_anew(
    make_server: Callable[..., RpcServer],
    make_client: Callable[..., RpcClient],
    heard: list[str],
    tmp_path: Path,
) -> None:
    address = f"ipc://{tmp_path}/socket"
    first = make_server(bind=address)
    client = make_client(address, liveness=lambda: None)
    kept = client.submit(Ask(text="keep"), 30.0)
    assert eventually(lambda: heard == ["keep"])
    first.close()
    make_server(bind=address)
    with pytest.raises(ConnectionLostError):
        kept.result(10)
    assert client.call(Ask(text="again"), 60.0).text == "again"
    assert heard == ["keep", "again"]  # nothing is said twice


@pytest.mark.parametrize(
    ("address", "local"),
    [
        ("ipc:///tmp/x", True),
        ("tcp://127.0.0.1:5", True),
        ("tcp://[::1]:5", True),
        ("tcp://localhost:5", True),
        ("tcp://10.0.0.1:5", False),
        ("tcp://0.0.0.0:5", False),
        ("tcp://node7:5", False),
        ("tcp://127.0.0.1:5;0.0.0.0:5", False),
    ],
)
def test_heartbeats_are_for_other_machines(address: str, local: bool) -> None:
    assert rpc_wire.is_on_this_machine(address) is local


# ---- addresses
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ipc", "tcp"])
def test_a_second_server_at_an_address_is_refused_and_the_first_goes_on(
    kind: str,
    make_server: Callable[..., RpcServer],
    make_client: Callable[..., RpcClient],
    tmp_path: Path,
) -> None:
    bind = f"ipc://{tmp_path}/socket" if kind == "ipc" else "tcp://127.0.0.1:0"
    first = make_server(bind=bind)
    with pytest.raises(AddressInUseError, match="another server listens"):
        check_free(first.address)
    with pytest.raises(AddressInUseError, match="another server listens"):
        make_server(bind=first.address)
    assert make_client(first.address).call(Ask(text="first"), 60.0).text == "first"
    first.close()
    check_free(first.address)
    second = make_server(bind=first.address)
    assert make_client(second.address).call(Ask(text="second"), 60.0).text == "second"


@pytest.mark.parametrize("bind", ["tcp://0.0.0.0:0", "tcp://*:0", "tcp://[::]:0", "tcp://[::1]:0"])
def test_a_server_at_all_addresses_says_one_that_others_can_use(
    bind: str, make_server: Callable[..., RpcServer], make_client: Callable[..., RpcClient]
) -> None:
    if "[" in bind and not _has_ipv6():
        pytest.skip("this machine has no IPv6")
    server = make_server(bind=bind)
    host = server.address.removeprefix("tcp://").rpartition(":")[0]
    assert host not in ("0.0.0.0", "*", "[::]")
    assert make_client(server.address).call(Ask(text="here"), 60.0).text == "here"


def _has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


def test_a_socket_file_of_a_dead_server_is_replaced(
    make_server: Callable[..., RpcServer], tmp_path: Path
) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
        left.listen()
    assert path.exists()
    make_server(bind=f"ipc://{path}")


def test_of_many_servers_that_start_at_once_one_gets_the_address(tmp_path: Path) -> None:
    address = f"ipc://{tmp_path}/socket"
    servers: list[RpcServer] = []
    refused: list[AddressInUseError] = []

    def start() -> None:
        try:
            servers.append(RpcServer(lambda call: None, Ask, bind=address))
        except AddressInUseError as error:
            refused.append(error)

    threads = [threading.Thread(target=start) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(servers), len(refused)) == (1, 5)
    servers[0].close()


# ---- forked children
# ---------------------------------------------------------------------------------------------------


def in_forked_child(action: Callable[[], None]) -> int:
    """Exit code of a forked child that does `action`: 0 when it ends well, 1 when it raises; killed after 10 s."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            signal.alarm(10)
            action()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded")
def test_a_forked_child_is_refused_at_once_and_closes_nothing_of_its_parent(
    make_server: Callable[..., RpcServer], make_client: Callable[..., RpcClient]
) -> None:
    server = make_server()
    client = make_client(server.address)
    assert client.call(Ask(text="before"), 60.0).text == "before"

    def use_what_is_the_parents() -> None:
        with pytest.raises(ForkedProcessError, match="forked child"):
            client.call(Ask(text="from the child"), 600.0)
        client.close()
        server.close()

    assert in_forked_child(use_what_is_the_parents) == 0
    assert client.call(Ask(text="after"), 60.0).text == "after"
    assert make_client(server.address).call(Ask(text="anew"), 60.0).text == "anew"


# ---- shortage
# ----------------------------------------------------------------------------------------------------------


def test_a_server_with_few_descriptors_survives_more_clients_than_it_can_have(
    make_client: Callable[..., RpcClient],
) -> None:
    program = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024));"
        "sys.argv = ['engine_process.py'];"
        f"sys.path.insert(0, {str(FOLDER)!r}); import engine_process; engine_process.main()"
    )
    process = Child("-c", program)
    clients: list[socket.socket] = []
    try:
        path = read_line(process).removeprefix("ipc://")
        end = time.monotonic() + 2
        while len(clients) < 1_100 and time.monotonic() < end:  # without a pause: a flood
            client = socket.socket(socket.AF_UNIX)
            client.settimeout(0.2)
            try:
                client.connect(path)
                clients.append(client)
            except OSError:
                client.close()
        assert process.poll() is None
        assert 50 < len(clients) < 1_024
        for client in clients:
            client.close()
        with WeightPublisher(f"ipc://{path}", timeout_s=10.0) as publisher:
            assert publisher.publish(weights(1.0)).version == 1
    finally:
        for client in clients:
            client.close()
        collect(process)


@pytest.fixture
def no_descriptors() -> Iterator[Callable[[], None]]:
    """Takes away every descriptor that is left, until the test ends."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_who_cannot_look_takes_nobody_for_dead_and_remembers_nothing_wrong(
    monkeypatch: pytest.MonkeyPatch, no_descriptors: Callable[[], None]
) -> None:
    parent = processes.ProcessRef(
        host=processes.host_id(),
        pid=os.getppid(),
        start_time=processes._state_and_start(os.getppid())[1],
    )
    me = processes.current_process()
    monkeypatch.setattr(processes, "_known", {})
    monkeypatch.setattr(processes, "_started", {})
    with monkeypatch.context() as shortage:
        no_descriptors()
        assert processes.host_id() == ""
        shortage.setattr(processes, "_known", {"host": parent.host})
        assert processes.why_dead(parent) is None
        unknown = processes.current_process()
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    assert processes.host_id() == me.host
    assert processes.current_process() == me
    assert processes.why_dead(unknown) is None  # a start that nobody knew is nobody's death
    gone = processes.ProcessRef(host=me.host, pid=2**22 + 1, start_time=1)
    assert "does not exist" in str(processes.why_dead(gone))


def test_a_message_for_which_there_is_no_memory_fails_alone_and_a_thread_that_fails_says_so(
    make_client: Callable[..., RpcClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    failures: list[BaseException] = []
    server = RpcServer(lambda call: call.reply(Say(text="ok")), Ask, on_failure=failures.append)
    decoder = server._body_decoder

    class Starved:
        def decode(self, body: bytes) -> Any:
            if b"big" in body:
                raise MemoryError("no memory for it")
            return decoder.decode(body)

    server._body_decoder = Starved()  # type: ignore[assignment]
    server.start()
    client = make_client(server.address)
    with pytest.raises(SyncError, match="MemoryError"):
        client.call(Ask(text="big"), 60.0)
    assert client.call(Ask(text="small"), 60.0).text == "ok"
    monkeypatch.setattr(server, "_flush", lambda: (_ for _ in ()).throw(MemoryError("none at all")))
    client.submit(Ask(text="last"), 60.0)
    assert eventually(lambda: len(failures) == 1)
    assert isinstance(failures[0], MemoryError)
