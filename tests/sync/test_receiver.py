"""The engine's half against messages: one session, leases, epochs, dead holders, limits, and fuzzed input."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sync_support import ToyEngine, eventually, weights

from weight_sync import WeightPublisher
from weight_sync.errors import (
    ERRORS,
    DeadlineExceeded,
    EngineDiedError,
    FingerprintMismatch,
    ManifestMismatch,
    ProtocolError,
    RemoteError,
    SessionBusy,
    SessionError,
    SyncError,
    TransportError,
)
from weight_sync.layout.fingerprints import ArenaFingerprints
from weight_sync.layout.manifest import Manifest, TensorMeta
from weight_sync.receiver.local_channel import LocalChannel
from weight_sync.transports.local import LocalArena
from weight_sync.wire.messages import (
    Abort,
    Begin,
    BeginReply,
    Bucket,
    CloseArena,
    Commit,
    EngineInfo,
    GetFingerprint,
    GetIgnored,
    Hello,
    LocalHandle,
    OpenArena,
    SharedMemoryHandle,
    Vote,
    WeightRequest,
)
from weight_sync.wire.process import current_process
from weight_sync.wire.rpc import RpcClient


class Trainer:
    """Speaks the protocol by hand."""

    def __init__(self, engine: ToyEngine, manifest: Manifest | None = None) -> None:
        self.channel = LocalChannel(engine.service)
        self.info: EngineInfo = self.channel.call(Hello(), 60.0)
        self.manifest = Manifest.from_wire(self.info.manifest) if manifest is None else manifest
        self.arena = LocalArena(self.manifest.arena_bytes)
        key = self.channel.lend(self.arena.buffer)
        handle = LocalHandle(key=key, num_bytes=self.manifest.arena_bytes)
        self.arena_id = self.channel.call(OpenArena(handle=handle), 60.0).arena_id

    def begin(self, session_id: str = "a", **fields: Any) -> BeginReply:
        default: dict[str, Any] = {
            "session_id": session_id,
            "holder": current_process(),
            "version": None,
            "base_version": None,
            "label": None,
            "manifest_digest": self.manifest.digest,
            "manifest": self.manifest.to_wire(),
            "arena_id": self.arena_id,
            "strict": True,
            "kv_policy": None,
            "verify": "pause",
            "lease_s": 30.0,
        }
        reply: BeginReply = self.channel.call(Begin(**(default | fields)), 60.0)
        return reply

    def fill(self, value: float) -> np.ndarray:
        for view in self.manifest.views(self.arena.buffer):
            view.fill_(value)
        values = ArenaFingerprints(self.manifest).values(self.arena.buffer)
        return values.numpy().view(np.uint64)

    def bucket(self, epoch: int, indices: Any, fingerprints: Any, session_id: str = "a") -> Any:
        message = Bucket(
            session_id=session_id,
            epoch=epoch,
            indices=np.asarray(indices, dtype="<u4").tobytes(),
            fingerprints=np.asarray(fingerprints, dtype="<u8").tobytes(),
        )
        return self.channel.call(message, 60.0)

    def commit(self, epoch: int, session_id: str = "a", timeout_s: float = 60.0) -> Any:
        return self.channel.call(
            Commit(session_id=session_id, epoch=epoch, timeout_s=timeout_s), 5.0
        )

    def stage_all(self, epoch: int, value: float, session_id: str = "a") -> None:
        values = self.fill(value)
        self.bucket(epoch, range(len(values)), values, session_id)


@pytest.fixture
def trainer(engine: ToyEngine) -> Trainer:
    return Trainer(engine)


def test_the_protocol_by_hand(engine: ToyEngine, trainer: Trainer) -> None:
    reply = trainer.begin(version=4, label="four", kv_policy="recompute")
    assert (reply.epoch, reply.version, reply.need_manifest) == (1, 4, False)
    trainer.stage_all(1, 2.0)
    done = trainer.commit(1)
    assert (done.version, done.label, done.num_updated, done.left) == (4, "four", 9, b"")
    assert engine.values() == {2.0}
    assert engine.host.events == [("written", 4, "four", "recompute")]


def test_a_digest_that_was_never_seen_asks_for_the_manifest_once(trainer: Trainer) -> None:
    tensors = trainer.manifest.tensors
    trainer.manifest = Manifest(tensors=tensors, bucket_bytes=12345)
    assert trainer.begin(manifest=None).need_manifest
    assert trainer.begin().epoch == 1
    trainer.channel.call(Abort(session_id="a", epoch=1, reason="x"), 60.0)
    assert trainer.begin("b", manifest=None).epoch == 2


def test_a_manifest_that_is_not_the_announced_one_is_refused(trainer: Trainer) -> None:
    with pytest.raises(ManifestMismatch, match="not the one that was announced"):
        trainer.begin(manifest_digest="0" * 64)


@pytest.mark.parametrize("order", ["reversed", "alias", "fused"])
def test_a_manifest_may_have_another_order_and_other_names(engine: ToyEngine, order: str) -> None:
    tensors = list(Trainer(engine).manifest.tensors)
    if order == "reversed":
        tensors.reverse()
    elif order == "alias":
        i = next(i for i, meta in enumerate(tensors) if meta.name == "embed.weight")
        tensors[i] = TensorMeta(name="lm_head.weight", shape=(24, 16), dtype=torch.bfloat16)
    else:
        parts = {f"layers.0.{name}.weight" for name in "qkv"}
        tensors = [meta for meta in tensors if meta.name not in parts]
        tensors.append(TensorMeta(name="layers.0.qkv.weight", shape=(32, 16), dtype=torch.bfloat16))
    trainer = Trainer(engine, Manifest(tensors=tuple(tensors), bucket_bytes=1 << 20))
    trainer.begin()
    trainer.stage_all(1, 3.0)
    reply = trainer.commit(1)
    assert engine.values() == {3.0} and reply.num_updated == 9
    assert reply.fingerprint == trainer.channel.call(GetFingerprint(), 60.0).fingerprint


def test_one_session_at_a_time_and_the_refusal_names_its_holder(trainer: Trainer) -> None:
    trainer.begin(lease_s=20.0)
    pid = current_process().pid
    with pytest.raises(
        SessionBusy, match=rf"session a of process {pid}.*lease left (20.0|19.\d) s"
    ):
        trainer.begin("b")


def test_a_lease_ends_a_silent_session_and_messages_extend_it(
    engine: ToyEngine, trainer: Trainer
) -> None:
    trainer.begin(lease_s=30.0)
    session = engine.receiver._session
    assert session is not None
    for _ in range(4):
        session.lease_end -= 20.0
        before = session.lease_end
        trainer.bucket(1, [], [])
        assert session.lease_end >= before + 20.0
    session.lease_end = 0.0
    assert eventually(lambda: engine.receiver._session is None)
    with pytest.raises(SessionError, match="nothing came for its lease"):
        trainer.stage_all(1, 1.0)
    assert trainer.begin("b").epoch == 2
    trainer.channel.call(Abort(session_id="b", epoch=2, reason="x"), 60.0)
    with pytest.raises(ProtocolError, match="a lease must end"):
        trainer.begin("c", lease_s=0.0)


def test_a_dead_holder_loses_its_session_to_the_next_begin(trainer: Trainer) -> None:
    dead = msgspec.structs.replace(current_process(), pid=2**22 + 1)
    trainer.begin(holder=dead)
    assert trainer.begin("b").epoch == 2
    with pytest.raises(SessionError, match="its trainer is dead"):
        trainer.commit(1)


def test_stale_epochs_and_unknown_sessions_are_refused(engine: ToyEngine, trainer: Trainer) -> None:
    trainer.begin()
    with pytest.raises(SessionError, match="another epoch: got 7, expected 1"):
        trainer.bucket(7, [], [])
    with pytest.raises(SessionError, match="no such session: got 'zzz'"):
        trainer.commit(1, "zzz")
    trainer.stage_all(1, 1.0)
    trainer.commit(1)
    with pytest.raises(SessionError, match="it was committed"):
        trainer.commit(1)
    trainer.begin("b")
    with pytest.raises(SessionError, match="it was committed"):
        trainer.bucket(1, [], [])
    trainer.channel.call(Abort(session_id="a", epoch=1, reason="late"), 60.0)
    assert engine.receiver._session is not None  # an abort of an old session leaves the new one


def test_a_bucket_is_checked_and_a_bad_one_ends_the_session(trainer: Trainer) -> None:
    values = trainer.fill(1.0)
    cases: list[tuple[Any, Any, type[Exception], str]] = [
        ([0, 0], values[[0, 0]], ManifestMismatch, "sent more than once"),
        ([99], [1], ProtocolError, "got index 99, expected below 9"),
        ([0, 1], [1], ProtocolError, "2 indices and 1 fingerprints"),
        ([0], [12345], FingerprintMismatch, trainer.manifest.tensors[0].name),
    ]
    for i, (indices, fingerprints, kind, text) in enumerate(cases):
        session_id = f"session {i}"
        epoch = trainer.begin(session_id).epoch
        with pytest.raises(kind, match=text):
            trainer.bucket(epoch, indices, fingerprints, session_id)
        with pytest.raises(kind, match=text):  # whatever comes later gets the same reason
            trainer.commit(epoch, session_id)
    epoch = trainer.begin("cut").epoch
    with pytest.raises(ProtocolError, match="a packed column is cut"):
        trainer.channel.call(
            Bucket(session_id="cut", epoch=epoch, indices=b"abc", fingerprints=b""), 5.0
        )
    epoch = trainer.begin("twice").epoch
    trainer.bucket(epoch, [3], values[[3]], "twice")
    with pytest.raises(ManifestMismatch, match="sent more than once"):
        trainer.bucket(epoch, [2, 3], values[[2, 3]], "twice")


def test_a_bucket_after_the_vote_is_refused(engine: ToyEngine, trainer: Trainer) -> None:
    values = trainer.fill(1.0)
    trainer.begin(strict=False)
    trainer.bucket(1, [0], values[[0]])
    trainer.channel.call(Vote(session_id="a", epoch=1), 60.0)
    with pytest.raises(SessionError, match="a bucket after the vote"):
        trainer.bucket(1, [1], values[[1]])
    with pytest.raises(SessionError, match="a bucket after the vote"):
        trainer.commit(1)
    assert engine.values() == {0.0}


def test_the_engine_steps_on_while_a_bucket_is_checked(
    engine: ToyEngine, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = trainer.fill(1.0)
    plan = engine.receiver._plans.canonical.plan
    checking, go_on = threading.Event(), threading.Event()
    original = plan.staged_fingerprints

    def slow(*arguments: Any) -> Any:
        checking.set()
        assert go_on.wait(60)
        return original(*arguments)

    monkeypatch.setattr(plan, "staged_fingerprints", slow)
    trainer.begin()
    future = trainer.channel.submit(
        Bucket(
            session_id="a",
            epoch=1,
            indices=np.arange(9, dtype="<u4").tobytes(),
            fingerprints=values.tobytes(),
        ),
        5.0,
    )
    assert checking.wait(60)
    assert engine.host.between_steps(lambda: "a step boundary", 1.0) == "a step boundary"
    assert not future.done()
    go_on.set()
    assert future.result(60).num_staged == 9


def test_arenas_are_opened_once_counted_and_checked(engine: ToyEngine, trainer: Trainer) -> None:
    with pytest.raises(TransportError, match="no such arena: got id 99"):
        trainer.begin(arena_id=99)
    with pytest.raises(TransportError, match="no such buffer was lent"):
        trainer.channel.call(OpenArena(handle=LocalHandle(key="x", num_bytes=1)), 60.0)
    small = torch.zeros(16, dtype=torch.uint8)
    handle = LocalHandle(key=trainer.channel.lend(small), num_bytes=16)
    arena_id = trainer.channel.call(OpenArena(handle=handle), 60.0).arena_id
    with pytest.raises(TransportError, match="too small: got 16 bytes"):
        trainer.begin(arena_id=arena_id)
    trainer.begin()
    trainer.channel.call(CloseArena(arena_id=trainer.arena_id), 60.0)
    with pytest.raises(SessionError, match="arena was closed"):
        trainer.commit(1)
    trainer.channel.call(CloseArena(arena_id=trainer.arena_id), 60.0)
    with pytest.raises(TransportError, match="too many arenas"):
        for _ in range(20):
            key = trainer.channel.lend(small)
            trainer.channel.call(OpenArena(handle=LocalHandle(key=key, num_bytes=16)), 60.0)


def test_a_call_whose_deadline_passed_in_the_queue_is_not_carried_out(
    engine: ToyEngine, trainer: Trainer
) -> None:
    trainer.begin()
    trainer.stage_all(1, 1.0)
    engine.host.blocked.set()
    first = trainer.channel.submit(Commit(session_id="a", epoch=1, timeout_s=0.3), 60.0)
    late = trainer.channel.submit(GetFingerprint(), 0.05)
    with pytest.raises(DeadlineExceeded, match="no step boundary"):
        first.result(60)
    with pytest.raises(DeadlineExceeded, match="was not carried out"):
        late.result(60)
    engine.host.blocked.clear()
    time.sleep(0.05)
    assert engine.values() == {0.0} and engine.receiver.version == 0


def test_a_closed_service_answers_everything_at_once(engine: ToyEngine, trainer: Trainer) -> None:
    engine.service.close()
    with pytest.raises(EngineDiedError, match="was shut down"):
        trainer.channel.call(Hello(), 30.0)


def test_what_is_no_weight_message_is_refused(trainer: Trainer) -> None:
    with pytest.raises(ProtocolError, match="got int, expected one of Abort, Begin"):
        trainer.channel.call(3, 60.0)


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[ToyEngine, RpcClient, WeightPublisher]]:
    engine = ToyEngine(serve=True)
    client = RpcClient(engine.address, Any, errors=ERRORS)
    publisher = WeightPublisher(engine.address, timeout_s=10)
    yield engine, client, publisher
    publisher.close()
    client.close()
    engine.close()


_INTS = st.integers(0, 2**31) | st.sampled_from([0, 1, 2, 9, 2**32, 2**62])
_ANY_MESSAGE = st.one_of(
    st.builds(Hello),
    st.builds(GetFingerprint),
    st.builds(GetIgnored, names=st.lists(st.text(max_size=9), max_size=4).map(tuple)),
    st.builds(CloseArena, arena_id=_INTS.map(lambda i: i + 100)),
    st.builds(
        Bucket, session_id=st.just("x"), epoch=_INTS, indices=st.binary(), fingerprints=st.binary()
    ),
    st.builds(Commit, session_id=st.just("x"), epoch=_INTS, timeout_s=st.floats(0, 0.1)),
    st.builds(Abort, session_id=st.just("x"), epoch=_INTS, reason=st.text(max_size=20)),
    st.builds(
        OpenArena,
        handle=st.builds(
            SharedMemoryHandle,
            owner=st.just(current_process()),
            fd=st.integers(0, 40),
            num_bytes=_INTS,
            nonce=st.binary(min_size=16, max_size=16),
        )
        | st.builds(LocalHandle, key=st.text(max_size=9), num_bytes=_INTS),
    ),
    st.builds(
        Begin,
        session_id=st.just("x"),
        holder=st.just(current_process()),
        version=st.none() | _INTS,
        base_version=st.none() | _INTS,
        label=st.none(),
        manifest_digest=st.sampled_from(["", "0" * 64]),
        manifest=st.none() | st.just(Manifest(tensors=(), bucket_bytes=1).to_wire()),
        arena_id=_INTS,
        strict=st.booleans(),
        kv_policy=st.none(),
        verify=st.sampled_from(["pause", "overlapped"]),
        lease_s=st.floats(0, 0.05),
    ),
)


@settings(max_examples=100, deadline=None)
@given(message=_ANY_MESSAGE, data=st.data())
def test_no_message_valid_or_mutated_harms_the_engine(
    served: tuple[ToyEngine, RpcClient, WeightPublisher],
    message: WeightRequest,
    data: st.DataObject,
) -> None:
    engine, client, publisher = served
    raw = bytearray(msgspec.msgpack.encode(message))
    if data.draw(st.booleans()):
        for _ in range(3):
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    version = engine.receiver.version
    try:
        client.call(msgspec.Raw(bytes(raw)), 60.0)
    except DeadlineExceeded:
        raise AssertionError("no answer") from None
    except (SyncError, msgspec.MsgspecError):
        pass
    assert engine.receiver.version == version
    assert publisher.fingerprint() >= 0


def test_the_fuzzed_engine_still_takes_an_update(
    served: tuple[ToyEngine, RpcClient, WeightPublisher],
) -> None:
    engine, _, publisher = served
    publisher.publish(weights(4.0))
    assert engine.values() == {4.0} and engine.host.mixtures == []


@pytest.mark.parametrize("serve", [False, True])
@pytest.mark.parametrize(
    ("raised", "expected"), [(RuntimeError, RemoteError), (TimeoutError, DeadlineExceeded)]
)
def test_an_accident_has_one_type_for_callers_of_this_process_and_of_others(
    make_engine: Callable[..., ToyEngine],
    serve: bool,
    raised: type[Exception],
    expected: type[Exception],
) -> None:
    engine = make_engine(serve=serve)

    def fail(_: Any) -> None:
        raise raised("on purpose")

    engine.service._actions[GetFingerprint] = fail
    channel = engine.weight_channel()
    with pytest.raises(expected, match=f"GetFingerprint failed with {raised.__name__}: on purpose"):
        channel.call(GetFingerprint(), 60.0)
    assert channel.call(Hello(), 60.0).version == 0
    channel.close()
