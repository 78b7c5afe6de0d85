"""Clients that vanish, clients that do not read, servers that are told to end, and owners that die."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
from many_descriptors import many_descriptors

from rollout import Engine, RolloutPool
from rollout.server import launch_server_process
from rollout.server.disconnects import EventStream

LONG = {"max_new_tokens": 450, "ignore_eos": True}
ROOMY = {"kv_cache_bytes": 16 << 20}


@pytest.fixture(scope="module")
def server(serve):
    return serve({"slow_client_s": 3.0}, **ROOMY)


def connection(server):
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=60)


def request_bytes(body, path="/generate"):
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n\r\n"
    return head.encode() + content


def num_requests(http):
    return http.get("/get_load").json()[0]["num_reqs"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("paused", [False, True])
def test_requests_of_a_client_that_vanishes_end(http, server, until, stream, paused):
    if paused:  # Nothing is sent meanwhile that could run into a closed connection.
        http.post("/pause_generation", json={"mode": "in_place"}).raise_for_status()
    try:
        body = {"input_ids": [[1], [2]], "sampling_params": {**LONG, "n": 4}, "stream": stream}
        client = connection(server)
        client.sendall(request_bytes(body))
        until("they run", lambda: num_requests(http) > 0)
        client.close()
        until("they have ended", lambda: num_requests(http) == 0)
    finally:
        http.post("/continue_generation", json={})
    assert (
        http.get("/get_load").json()[0]["num_tokens"] == 0 or http.post("/flush_cache").is_success
    )


def test_a_client_that_does_not_read_loses_its_connection_and_its_requests(http, server, until):
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    host, port = server.url.removeprefix("http://").split(":")
    client.connect((host, int(port)))
    body = {
        "input_ids": [1],
        "sampling_params": {**LONG, "n": 16},
        "stream": True,
        "return_logprob": True,
        "top_logprobs_num": 20,
    }
    client.sendall(request_bytes(body))
    descriptors = Path(f"/proc/{server.pid}/fd")
    until(
        "the server has given up", lambda: num_requests(http) == 0 and _has_ended(client, 0.5), 120
    )
    client.close()
    assert len(list(descriptors.iterdir())) < 200
    assert http.get("/health").status_code == 200


def _has_ended(client, patience_s):
    """Whether the other end has closed or reset, after what had been sent before."""
    client.settimeout(patience_s)
    try:
        return not client.recv(16)
    except TimeoutError:
        return False
    except ConnectionError:
        return True


def test_a_body_that_never_comes_is_not_waited_for(http, server):
    with connection(server) as client:
        client.sendall(b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{")
        assert b" 408 " in read_until(client, b"\r\n").partition(b"\r\n")[0]


@pytest.mark.parametrize("beginning", [b"", b"G", b"GET /health HTTP/1.1\r\nHost: localh"])
def test_a_head_that_never_comes_is_not_waited_for(server, beginning):
    with connection(server) as client:
        client.sendall(beginning)
        answer = read_to_end(client)
    assert answer.startswith(b"HTTP/1.1 408 ") if beginning else answer == b""


def test_a_head_that_comes_drop_by_drop_is_not_waited_for(server):
    """Each byte alone would keep a connection open whose clock began anew with it."""
    with connection(server) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: ")
        start = time.monotonic()
        with pytest.raises(ConnectionError):
            while time.monotonic() < start + 60:
                client.sendall(b"x")
                time.sleep(0.05)


def test_a_connection_is_kept_for_the_next_request_and_its_head_has_a_clock_too(server):
    request = b"GET /ping HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with connection(server) as client:
        for _ in range(3):
            client.sendall(request)
            assert read_until(client, b'{"status":"ok"}')
        client.sendall(request[:20])
        assert read_to_end(client).startswith(b"HTTP/1.1 408 ")


def test_requests_behind_one_that_takes_long_are_not_late(http, server):
    """The server itself does not read on meanwhile, though a part of the third one's head has come."""
    body = {"input_ids": [1], "sampling_params": {"max_new_tokens": 4, "ignore_eos": True}}
    ping = b"GET /ping HTTP/1.1\r\nHost: localhost\r\n\r\n"
    http.post("/slow_down", json={"forward_sleep_time": 1.2}).raise_for_status()
    try:
        with connection(server) as client:
            client.sendall(request_bytes(body) + ping + ping[:20])
            answers = client.recv(1 << 16)
            while b'{"status":"ok"}' not in answers:
                answers += client.recv(1 << 16)
            client.sendall(ping[20:])
            assert read_until(client, b'{"status":"ok"}')
    finally:
        http.post("/slow_down", json={"forward_sleep_time": 0})
    assert b'"output_ids"' in answers


def test_a_head_without_end_is_cut_off(http, server):
    before = resident_bytes(server)
    with connection(server) as client:
        answer = b""
        try:
            client.sendall(b"GET /health HTTP/1.1\r\nX: ")
            for _ in range(1000):
                client.sendall(b"x" * (1 << 16))
        except ConnectionError:
            pass
        else:
            answer = read_to_end(client)
    assert answer in (b"",) or answer.startswith(b"HTTP/1.1 431 ")
    assert resident_bytes(server) < before + (32 << 20)
    assert http.get("/health").status_code == 200


def test_a_client_that_was_turned_away_is_not_listened_to_for_ever(serve):
    server = serve({"api_keys": ["k"], "slow_client_s": 3.0})
    with connection(server) as client:
        head = b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n"
        client.sendall(head)
        assert b" 401 " in read_until(client, b"\r\n").partition(b"\r\n")[0]
        start = time.monotonic()
        with pytest.raises(ConnectionError):
            while time.monotonic() < start + 60:
                client.sendall(b"x")
                time.sleep(0.05)


def read_until(client, words):
    answer = b""
    while words not in answer and (part := client.recv(4096)):
        answer += part
    assert words in answer
    return answer


def read_to_end(client):
    answer = b""
    with contextlib.suppress(ConnectionError):
        while part := client.recv(4096):
            answer += part
    return answer


def resident_bytes(server):
    for line in Path(f"/proc/{server.pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmRSS")


@pytest.mark.usefixtures("started_anew")
def test_a_server_that_is_told_to_end_lets_what_runs_finish(serve):
    server = serve({"drain_s": 60.0})
    with httpx.Client(base_url=server.url, timeout=120) as http:
        answers, began = [], threading.Event()

        def ask():
            body = {
                "input_ids": [1],
                "sampling_params": {"max_new_tokens": 100, "ignore_eos": True},
                "stream": True,
            }
            with http.stream("POST", "/generate", json=body) as reply:
                for line in reply.iter_lines():
                    if line.startswith("data: {"):
                        answers.append(json.loads(line.removeprefix("data: ")))
                        began.set()

        thread = threading.Thread(target=ask)
        thread.start()
        assert began.wait(60)
        os.kill(server.pid, signal.SIGTERM)
        thread.join(120)
    last = answers[-1]
    assert last["meta_info"]["finish_reason"] == {"type": "length", "length": 100}
    assert server.close() == 0


def test_an_owner_may_block_signals_and_have_many_descriptors(serve):
    """The server would live on without it: it ends itself by a signal, and inherits what its owner blocks."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        with many_descriptors():
            server = serve({"drain_s": 0.2})
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    assert server.close() == 0


def test_what_does_not_finish_in_time_is_aborted_with_the_reason(serve):
    server = serve({"drain_s": 0.2})
    with httpx.Client(base_url=server.url, timeout=120) as http:
        http.post("/pause_generation", json={"mode": "in_place"}).raise_for_status()
        answers = []

        def ask():
            answers.append(http.post("/generate", json={"input_ids": [1], "sampling_params": LONG}))

        thread = threading.Thread(target=ask)
        thread.start()
        while num_requests(http) == 0:
            time.sleep(0.02)
        os.kill(server.pid, signal.SIGTERM)
        thread.join(120)
    reason = answers[0].json()["meta_info"]["finish_reason"]
    assert reason == {"type": "abort", "message": "the server is shutting down"}
    assert server.close() == 0


def test_a_stream_whose_client_has_gone_before_it_began_ends_its_call():
    """A generator that was never begun runs no `finally`."""
    closed = []

    class Source:
        async def aclose(self):
            closed.append("source")

    async def events():
        try:
            yield b""
        finally:
            closed.append("events")

    async def run():
        async def receive():
            return {"type": "http.disconnect"}

        async def send(message):
            await asyncio.Event().wait()  # The connection is full of what came before.

        await EventStream(events(), Source(), 60.0)({}, receive, send)

    asyncio.run(run())
    assert closed == ["source"]


def is_alive(pid):
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


def test_a_server_ends_with_its_owner_and_its_engine_with_it(folder, until, tmp_path):
    """Also where another process holds the owner's pipes, and in a folder whose files are called like modules."""
    for name in ("random.py", "tokenizers.py", "rollout.py"):
        (tmp_path / name).write_text("raise RuntimeError('this is not the module you want')\n")
    code = (
        "import os, sys, time\n"
        "sys.path[:] = [entry for entry in sys.path if entry]\n"
        "from rollout.server import launch_server_process\n"
        f"server = launch_server_process({str(folder)!r}, server={{'port': 0}}, kv_cache_bytes=1 << 20)\n"
        "forked = os.fork() or time.sleep(300) or os._exit(0)\n"
        "print(server.pid, forked, flush=True)\n"
        "input()\n"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    pid, forked = map(int, owner.stdout.readline().split())
    engine = next(
        int(child)
        for task in Path(f"/proc/{pid}/task").iterdir()
        for child in (task / "children").read_text().split()
    )
    owner.kill()
    owner.wait()
    try:
        until("the server's end", lambda: not is_alive(pid))
        until("the engine's end", lambda: not is_alive(engine))
    finally:
        os.kill(forked, signal.SIGKILL)


def test_a_server_over_the_address_of_an_engine_leaves_it_alone(folder):
    with Engine(str(folder), executor="local", kv_cache_bytes=1 << 20, num_threads=1) as engine:
        with launch_server_process(address=engine.address, server={"port": 0}) as server:
            body = {"text": "a", "sampling_params": {"max_new_tokens": 3, "ignore_eos": True}}
            found = httpx.post(f"{server.url}/generate", json=body, timeout=60).json()
            assert len(found["output_ids"]) == 3
        assert (
            len(engine.generate("a", {"max_new_tokens": 3, "ignore_eos": True})["output_ids"]) == 3
        )


def test_a_server_over_a_pool_serves_all_replicas(folder):
    options = {"kv_cache_bytes": 1 << 20, "num_threads": 1}
    with RolloutPool(str(folder), num_replicas=2, **options) as pool:
        with launch_server_process(address=pool.address, server={"port": 0}) as server:
            ids = [[i + 1, i + 2] for i in range(8)]
            body = {"input_ids": ids, "sampling_params": {"max_new_tokens": 3, "ignore_eos": True}}
            found = httpx.post(f"{server.url}/generate", json=body, timeout=60).json()
            assert len({result["meta_info"]["engine_id"] for result in found}) == 2
            body = {"model_path": str(folder), "weight_version": "next"}
            reply = httpx.post(f"{server.url}/update_weights_from_disk", json=body, timeout=60)
            assert reply.json()["success"] is True
        assert (pool.version, pool.weight_version) == (1, "next")
