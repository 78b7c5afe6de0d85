"""Hostile bytes on an engine's own wire: it answers or drops them, goes on, and stays bounded."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rollout import Engine
from rollout.errors import ERRORS
from rollout.protocol import commands as cmd
from rollout.protocol.wire import REPLY_TYPES, REQUEST_TYPES
from rollout.sampling_params import SamplingParams
from weight_sync.wire import messages as wm
from weight_sync.wire.process import current_process
from weight_sync.wire.rpc import RpcClient
from weight_sync.wire.rpc_wire import PROTOCOL_VERSION, RequestHeader

PROMPT = [5, 9, 2]
GREEDY = {"temperature": 0.0, "max_new_tokens": 4, "ignore_eos": True}
MAX_ANSWER_BYTES = 1 << 19

GENERATE = cmd.Generate(
    prompts=[
        cmd.PromptSpec(
            rid="a", input_ids=PROMPT, params=SamplingParams(max_new_tokens=3), return_logprob=True
        )
    ]
)
BEGIN = wm.Begin(
    session_id="s",
    holder=current_process(),
    version=None,
    base_version=None,
    label=None,
    manifest_digest="0" * 64,
    manifest=None,
    arena_id=1,
    strict=True,
    kv_policy=None,
    verify="pause",
    lease_s=0.01,
)
SEEDS: list[Any] = [
    GENERATE,
    cmd.AbortRequests(rids=["a"]),
    cmd.PauseGeneration(mode="retract", lease_s=0.01),
    cmd.ContinueGeneration(),
    cmd.FlushCache(),
    cmd.FreezeGc(),
    cmd.RecordExperts(action="stop"),
    cmd.GetWeights(name="model.norm.weight", truncate_size=3),
    cmd.GetStatus(),
    wm.Hello(),
    wm.GetIgnored(names=("x",)),
    wm.OpenArena(handle=wm.LocalHandle(key="k", num_bytes=9)),
    wm.OpenArena(
        handle=wm.SharedMemoryHandle(owner=current_process(), fd=0, num_bytes=4096, nonce=b"0" * 16)
    ),
    wm.CloseArena(arena_id=1),
    BEGIN,
    wm.Bucket(session_id="s", epoch=1, indices=b"\0" * 4, fingerprints=b"\0" * 8),
    wm.Vote(session_id="s", epoch=1),
    wm.Commit(session_id="s", epoch=1, timeout_s=1.0),
    wm.Abort(session_id="s", epoch=1, reason="fuzz"),
    wm.GetFingerprint(),
]
ODD: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(),
    st.text(max_size=20),
    st.binary(max_size=20),
    st.lists(st.integers(0, 300), max_size=4),
    st.dictionaries(st.text(max_size=8), st.integers(0, 9), max_size=2),
    st.just("x" * 70_000),
    st.just([0] * 2_000),
)


@pytest.fixture(scope="module")
def served(tiny_checkpoint: Callable[..., Path]) -> Iterator[Engine]:
    """An engine with a socket, in this process: were it to crash, the test would too."""
    with Engine(
        tiny_checkpoint("qwen2", tie_word_embeddings=True),
        listen="tcp://127.0.0.1:0",
        skip_tokenizer_init=True,
        kv_cache_bytes=1 << 20,
    ) as engine:
        yield engine


class RawClient:
    """A DEALER that sends whatever it likes."""

    def __init__(self, address: str) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RCVTIMEO, 20_000)
        self._socket.connect(address)
        self._count = 0

    def send(self, *frames: bytes) -> None:
        self._socket.send_multipart(frames)

    def ask(self, body: bytes) -> list[bytes]:
        """The last frames that answer `body`, which comes behind a sound header."""
        self._count += 1
        header = RequestHeader(protocol=PROTOCOL_VERSION, id=self._count, timeout_s=5.0)
        self.send(msgspec.msgpack.encode(header), body)
        while True:
            frames = self._socket.recv_multipart()
            _, number, kind, _ = msgspec.msgpack.decode(frames[0])
            if number == self._count and kind != "chunk":
                return frames

    def close(self) -> None:
        self._socket.close()
        self._context.term()


@pytest.fixture(scope="module")
def raw(served: Engine) -> Iterator[RawClient]:
    client = RawClient(served.address)
    yield client
    client.close()


@pytest.fixture(scope="module")
def good(served: Engine) -> Iterator[Callable[[], None]]:
    """Asks for what must be answered as ever."""
    client = RpcClient(served.address, REPLY_TYPES, errors=ERRORS)
    expected = served.generate(input_ids=PROMPT, sampling_params=GREEDY)["output_ids"]
    fingerprint = served.weights_fingerprint()

    def ask() -> None:
        client.call(cmd.ContinueGeneration(), 20.0)
        result = served.generate(input_ids=PROMPT, sampling_params=GREEDY)
        assert result["output_ids"] == expected
        assert client.call(wm.GetFingerprint(), 20.0).fingerprint == fingerprint
        assert client.call(cmd.GetStatus(), 20.0).num_running == 0

    yield ask
    client.close()


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something can be replaced in a decoded message."""
    yield path
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, inner in items:
        yield from places(inner, (*path, key))


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    key, rest = path[0], path[1:]
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[key] = replaced(copy[key], rest, new)
    return copy


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A message of the wire with one or two values, or some bytes, that are not what they should be."""
    message = msgspec.msgpack.decode(msgspec.msgpack.encode(draw(st.sampled_from(SEEDS))))
    for _ in range(draw(st.integers(0, 2))):
        where = draw(st.sampled_from(list(places(message))))
        if where and where[-1] == "type":
            continue
        message = replaced(message, where, draw(ODD))
        if not isinstance(message, dict):
            break
    data = bytearray(msgspec.msgpack.encode(message))
    if draw(st.integers(0, 3)) == 0 and data:
        for _ in range(draw(st.integers(1, 4))):
            data[draw(st.integers(0, len(data) - 1))] ^= 1 << draw(st.integers(0, 7))
    return bytes(data)


def is_shutdown(data: bytes) -> bool:
    try:
        message = msgspec.msgpack.decode(data, type=REQUEST_TYPES)
    except (msgspec.MsgspecError, ValueError, OverflowError, RecursionError):
        return False
    keeps_going = isinstance(message, cmd.PauseGeneration) and message.lease_s > 0.1
    moves = isinstance(message, cmd.ReleaseMemory | cmd.ResumeMemory | cmd.Shutdown)
    return keeps_going or moves


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=mutated())
def test_a_mutated_message_is_answered_and_bounded(raw: RawClient, data: bytes) -> None:
    if not is_shutdown(data):
        header, answer = raw.ask(data)
        assert len(header) < 64 and len(answer) <= MAX_ANSWER_BYTES


@settings(
    max_examples=50,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(frames=st.lists(st.binary(max_size=200), min_size=1, max_size=5))
def test_random_frames_are_dropped_or_answered(raw: RawClient, frames: list[bytes]) -> None:
    raw.send(*frames)
    assert raw.ask(msgspec.msgpack.encode(wm.GetIgnored(names=()))) is not None


def test_after_all_that_the_engine_serves_as_before(
    raw: RawClient, good: Callable[[], None]
) -> None:
    for seed in SEEDS:
        raw.ask(msgspec.msgpack.encode(seed))
    for junk in (b"", b"\xc1", b"\xdf\xff\xff\xff\xff", b"\x91" * 5_000, b"\x81\xa4type"):
        header, _ = raw.ask(junk)
        assert msgspec.msgpack.decode(header)[2] == "error"
    good()


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        bytes(range(256)) * 40,
        b"\xff" + b"\0" * 8 + b"\x7f" + b"\x03" + b"\0" * 100,
    ],
    ids=["http", "http2", "bytes", "half a greeting"],
)
def test_another_protocol_on_the_port_does_no_harm(
    served: Engine, good: Callable[[], None], data: bytes
) -> None:
    host, port = served.address.removeprefix("tcp://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(data)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    good()


@pytest.mark.parametrize(
    "body",
    [
        {"type": "Generate", "prompts": []},
        {"type": "Generate", "prompts": [{"rid": "x" * 300, "input_ids": [1], "params": {}}]},
        {"type": "Generate", "prompts": [{"rid": "x", "input_ids": [-1], "params": {}}]},
        {"type": "Generate", "prompts": [{"rid": "x", "input_ids": [1], "params": {"n": -3}}]},
        {"type": "PauseGeneration", "mode": "abort", "lease_s": 1e30},
        {"type": "PauseGeneration", "mode": "sideways"},
        {"type": "GetWeights", "name": "n" * 600},
        {"type": "Begin"},
        {"type": "NoSuchCommand"},
        {"type": "GetStatus", "extra": 1},
    ],
    ids=lambda body: body["type"],
)
def test_what_is_out_of_bounds_is_refused(
    raw: RawClient, good: Callable[[], None], body: dict[str, Any]
) -> None:
    header, answer = raw.ask(msgspec.msgpack.encode(body))
    assert msgspec.msgpack.decode(header)[2] == "error"
    assert len(answer) < 10_000
    good()
