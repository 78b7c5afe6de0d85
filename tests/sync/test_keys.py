"""Who gets through to a socket: owner-only files, and keys as soon as an address leaves the machine."""

import contextlib
import os
import socket
import stat
import threading

import msgspec
import pytest
import zmq

from weight_sync.errors import (
    ERRORS,
    DeadlineExceeded,
    InsecureAddressError,
    UnauthorizedError,
)
from weight_sync.joint.engines import _name
from weight_sync.publisher.publisher import WeightPublisher
from weight_sync.wire import keys as keys_module
from weight_sync.wire.keys import Address, ServerKeys, is_on_this_machine, shown
from weight_sync.wire.rpc import RpcClient, RpcServer

ELSEWHERE = "tcp://0.0.0.0:0"
"""An address that other machines can reach."""


class Echo(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    text: str
    chunks: int = 0


class Answer(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    text: str


@pytest.fixture
def serve():
    """Starts servers that echo, and note in `calls` what reached their handler."""
    made = []

    def start(bind=ELSEWHERE, **options):
        calls = []

        def handler(call):
            calls.append(call.body)
            for number in range(call.body.chunks):
                call.stream(Answer(text=str(number)))
            call.reply(Answer(text=call.body.text))

        server = RpcServer(handler, Echo, bind=bind, **options)
        server.calls = calls
        server.start()
        made.append(server)
        return server

    yield start
    for server in made:
        server.close()


@pytest.fixture
def connect():
    made = []

    def start(address, **options):
        made.append(RpcClient(address, Answer, errors=ERRORS, **options))
        return made[-1]

    yield start
    for client in made:
        client.close()


def port_of(address):
    return int(shown(address).rpartition(":")[2])


def with_key(address, key):
    return f"{shown(address)}?key={key}"


def test_an_address_that_leaves_the_machine_has_a_key_and_with_it_everything_works(serve, connect):
    server = serve()
    endpoint, _, key = server.address.partition("?key=")
    assert endpoint.startswith("tcp://") and len(key) == 86
    client = connect(server.address)
    assert client.call(Echo(text="hello"), timeout_s=30.0).text == "hello"
    chunks = []
    answer = client.submit(Echo(text="hello", chunks=3), timeout_s=30.0, on_chunk=chunks.append)
    assert answer.result().text == "hello" and len(chunks) == 3


def test_without_the_key_nothing_gets_through_and_the_error_says_so(serve, connect):
    server = serve()
    client = connect(shown(server.address))
    with pytest.raises(
        UnauthorizedError, match=r"got no key, expected the one that belongs"
    ) as refusal:
        client.call(Echo(text="hello"), timeout_s=30.0)
    assert "engine.address" in str(refusal.value)
    assert server.calls == []


def test_another_engines_key_opens_nothing(serve, connect):
    server, other = serve(), serve()
    client = connect(with_key(server.address, other.address.partition("?key=")[2]))
    with pytest.raises(UnauthorizedError, match="the key of another engine"):
        client.call(Echo(text="hello"), timeout_s=30.0)
    assert server.calls == [] and other.calls == []


def test_the_servers_public_key_alone_opens_nothing(serve, connect):
    server = serve()
    stolen = ServerKeys.new()
    public = keys_module.ClientKeys.parse(server.address.partition("?key=")[2]).server
    client = connect(with_key(server.address, keys_module._joined(public, stolen.client_secret)))
    with pytest.raises(UnauthorizedError):
        client.call(Echo(text="hello"), timeout_s=30.0)
    assert server.calls == []


def test_a_refused_client_has_its_error_by_the_deadline_of_its_call(serve, connect):
    client = connect(shown(serve().address))
    with pytest.raises((DeadlineExceeded, UnauthorizedError)):
        client.call(Echo(text="hello"), timeout_s=0.3)


def test_those_who_are_refused_do_not_disturb_those_who_are_not(serve, connect):
    server = serve()
    inside = connect(server.address)
    for _ in range(3):
        with pytest.raises(UnauthorizedError):
            connect(shown(server.address)).call(Echo(text="no"), timeout_s=30.0)
        assert inside.call(Echo(text="yes"), timeout_s=30.0).text == "yes"


def test_what_is_no_zeromq_at_all_is_dropped(serve, connect):
    server = serve()
    greetings = [
        b"GET / HTTP/1.1\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        bytes(200),
        b"\xff" * 200,
    ]
    for greeting in greetings:
        place = ("127.0.0.1", port_of(server.address))
        # The server may hang up at any of these.
        with socket.create_connection(place, timeout=30) as raw, contextlib.suppress(OSError):
            raw.sendall(greeting)
            raw.shutdown(socket.SHUT_WR)
            while raw.recv(4096):
                pass
    assert connect(server.address).call(Echo(text="hello"), timeout_s=30.0).text == "hello"
    assert len(server.calls) == 1


def test_words_are_not_readable_on_the_way(serve, connect):
    """A relay between client and server sees neither."""
    server = serve()
    seen = bytearray()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(30)

        def pump(source, sink):
            try:
                while data := source.recv(4096):
                    seen.extend(data)
                    sink.sendall(data)
            except OSError:
                pass

        def relay():
            near, _ = listener.accept()
            far = socket.create_connection(("127.0.0.1", port_of(server.address)))
            pumps = [
                threading.Thread(target=pump, args=pair) for pair in ((near, far), (far, near))
            ]
            for thread in pumps:
                thread.start()
            pumps[0].join()
            far.close()
            pumps[1].join()
            near.close()

        thread = threading.Thread(target=relay)
        thread.start()
        key = server.address.partition("?")[2]
        client = connect(f"tcp://127.0.0.1:{listener.getsockname()[1]}?{key}")
        assert client.call(Echo(text="a word nobody may read"), timeout_s=30.0).text
        client.close()
        thread.join(30)
    assert b"CURVE" in seen and b"a word nobody" not in seen


def test_loopback_and_private_files_need_no_key(serve, connect):
    for bind in ("tcp://127.0.0.1:0", None):
        server = serve(bind)
        assert "key" not in server.address
        assert connect(server.address).call(Echo(text="hello"), timeout_s=30.0).text == "hello"


def test_a_key_for_a_server_without_one_is_an_error_that_says_so(serve, connect):
    server = serve("tcp://127.0.0.1:0")
    client = connect(with_key(server.address, ServerKeys.new().key))
    with pytest.raises(UnauthorizedError):
        client.call(Echo(text="hello"), timeout_s=30.0)


def test_insecure_has_to_be_said_and_is_logged(serve, connect, caplog):
    server = serve(insecure=True)
    assert "key" not in server.address
    assert "anybody who reaches tcp://0.0.0.0:0 can do everything" in caplog.text
    assert connect(server.address).call(Echo(text="hello"), timeout_s=30.0).text == "hello"


def test_a_zeromq_without_curve_listens_to_nobody_elsewhere(serve, monkeypatch):
    monkeypatch.setattr(zmq, "has", lambda what: False)
    with pytest.raises(InsecureAddressError, match="without CURVE"):
        serve()
    assert serve("tcp://127.0.0.1:0").address


# ---- keys in a file --------------------------------------------------------------------------------------------------


def test_keys_in_a_file_survive_a_restart_and_serve_on_loopback_too(serve, connect, tmp_path):
    file = tmp_path / "engine.key"
    first = serve(f"tcp://127.0.0.1:0?key_file={file}")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    port, key = port_of(first.address), first.address.partition("?")[2]
    by_file = f"tcp://127.0.0.1:{port}?key_file={file}"
    assert connect(by_file).call(Echo(text="hello"), timeout_s=30.0).text == "hello"
    first.close()
    again = serve(by_file)
    assert again.address == f"tcp://127.0.0.1:{port}?{key}"
    assert connect(first.address).call(Echo(text="hello"), timeout_s=30.0).text == "hello"
    with pytest.raises(UnauthorizedError):
        connect(shown(first.address)).call(Echo(text="hello"), timeout_s=30.0)
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("mode", [0o644, 0o660, 0o604])
def test_a_key_file_that_others_may_read_is_refused(serve, tmp_path, mode):
    file = tmp_path / "engine.key"
    serve(f"tcp://127.0.0.1:0?key_file={file}").close()
    file.chmod(mode)
    with pytest.raises(InsecureAddressError, match=f"mode {mode:o}"):
        serve(f"tcp://127.0.0.1:0?key_file={file}")


def test_a_key_file_that_is_none_is_refused(serve, connect, tmp_path):
    file = tmp_path / "engine.key"
    with pytest.raises(InsecureAddressError, match="No such file"):
        connect(f"tcp://127.0.0.1:1?key_file={file}")
    assert not file.exists()
    with pytest.raises(InsecureAddressError, match="No such file"):
        serve(f"tcp://127.0.0.1:0?key_file={tmp_path}/not/there")
    file.write_text("secret")
    file.chmod(0o600)
    with pytest.raises(ValueError, match="not a key: got 6 characters"):
        serve(f"tcp://127.0.0.1:0?key_file={file}")


# ---- addresses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "query", ["key=short", "key=", "key=" + "!" * 86, "kee=1", "", "key", "key_file=/x&key=1"]
)
def test_an_address_with_another_question_is_refused_without_showing_it(connect, query):
    with pytest.raises(ValueError) as refusal:
        connect(f"tcp://127.0.0.1:1?{query}")
    assert "!!!" not in str(refusal.value)


def test_a_server_takes_no_key_in_its_address(serve):
    with pytest.raises(ValueError, match="expected key_file"):
        serve(f"tcp://127.0.0.1:0?key={ServerKeys.new().key}")


def test_no_message_or_repr_shows_a_key(serve, connect, caplog):
    server = serve()
    key = server.address.partition("?key=")[2]
    client = connect(server.address)
    assert client.call(Echo(text="hello"), timeout_s=30.0).text == "hello"
    server.close()
    with pytest.raises(Exception) as lost:
        client.call(Echo(text="hello"), timeout_s=30.0)
    texts = [str(lost.value), repr(client._keys), repr(client._place), client.address, caplog.text]
    assert not any(key[:20] in text or key[-20:] in text for text in texts)


# ---- socket files ----------------------------------------------------------------------------------------------------


def test_a_socket_file_is_its_owners_alone_whatever_the_umask(serve, tmp_path):
    before = os.umask(0)
    try:
        for bind in (None, f"ipc://{tmp_path}/socket"):
            path = serve(bind).address.removeprefix("ipc://")
            assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
            assert stat.S_IMODE(os.stat(os.path.dirname(path)).st_mode) == 0o700
    finally:
        os.umask(before)


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o701, 0o1777])
def test_a_folder_that_others_may_enter_is_refused(serve, tmp_path, mode):
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(InsecureAddressError, match="mkdir -m 700"):
        serve(f"ipc://{folder}/socket")
    assert list(folder.iterdir()) == []
    assert serve(f"ipc://{folder}/socket", insecure=True).address.endswith("/socket")


@pytest.mark.parametrize("name", ["@abstract-socket", "*"])
def test_a_socket_without_a_folder_is_refused(serve, name):
    with pytest.raises(InsecureAddressError, match="a socket without a folder"):
        serve(f"ipc://{name}")


@pytest.mark.parametrize("kind", ["pipe", "bytes", "device"])
def test_a_key_file_that_is_no_text_file_is_refused_at_once(serve, tmp_path, kind):
    path = tmp_path / "keys"
    if kind == "pipe":
        os.mkfifo(path, 0o600)
    elif kind == "bytes":
        path.touch(0o600)
        path.write_bytes(bytes(range(256)))
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(
        (ValueError, InsecureAddressError), match=r"; (use|remove|correct)"
    ) as refusal:
        serve(f"tcp://127.0.0.1:0?key_file={path}")
    assert "\n" not in str(refusal.value) and "codec" not in str(refusal.value)


@pytest.mark.parametrize(
    "address",
    ["tcp://127.0.0.1:1;0.0.0.0:0", "tcp://127.nowhere.example:1", "tcp://127.0.0.1.example:1"],
)
def test_what_only_begins_like_an_address_of_this_machine_is_none(address):
    assert not is_on_this_machine(address)
    assert Address.of_server(address).server_keys(insecure=False) is not None


def test_no_error_about_an_address_shows_its_key(connect):
    key = ServerKeys.new().key
    errors = [connect(f"tcp://127.0.0.1:1?key={key}")._home.error()]
    for refused in (connect, WeightPublisher):
        for address in (f"127.0.0.1:1?key={key}", f"http://127.0.0.1:1?key={key}"):
            with pytest.raises(ValueError, match=r"127\.0\.0\.1:1") as refusal:
                refused(address)
            errors.append(refusal.value)
    with pytest.raises(ValueError, match="no port") as refusal:
        connect(f"tcp://no port?key={key}")
    texts = [str(error) for error in (*errors, refusal.value)]
    texts.append(_name(0, f"tcp://127.0.0.1:1?key={key}"))
    assert not any(key[:20] in text or key[-20:] in text for text in texts)


@pytest.mark.parametrize("port", ["65536", "99999", "-1", "9" * 5000])
def test_a_port_that_does_not_exist_is_not_taken_for_another(connect, serve, port):
    for start in (connect, serve):
        with pytest.raises(ValueError, match="expected a port from 0 to 65535") as refusal:
            start(f"tcp://127.0.0.1:{port}")
        assert len(str(refusal.value)) < 400


@pytest.mark.parametrize("address", [None, 5, b"tcp://127.0.0.1:1", [], "tcp://\ud800:1", "\x00"])
def test_what_is_no_text_is_no_address(address: object) -> None:
    for kind in (Address.of_client, Address.of_server):
        with pytest.raises(ValueError, match="not an address"):
            kind(address)  # type: ignore[arg-type]
