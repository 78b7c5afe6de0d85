"""What is too late for its caller is not done, also where the loop had decided to do it and was stopped before."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from stopped import LateThreads
from sync_support import ToyEngine, eventually, weights

from rollout import Engine
from rollout.engine.loop import inbox
from rollout.engine.loop.inbox import Inbox
from rollout.engine.loop.rank_weights import LeadingWeights
from rollout.engine.loop.ticks import NullCall
from rollout.protocol import commands as cmd
from rollout.protocol.tick_messages import Boundary
from weight_sync import DeadlineExceeded, SyncError, WeightPublisher
from weight_sync.errors import ERRORS
from weight_sync.receiver import agreement
from weight_sync.wire.channel import RpcChannel
from weight_sync.wire.messages import SetLabel, WeightReply, WeightRequest
from weight_sync.wire.rpc import RpcClient, RpcServer


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> set[threading.Thread]:
    """Threads that have been stopped for long when they are about to do what cannot be taken back."""
    clock = LateThreads()
    for module in (agreement, inbox):
        monkeypatch.setattr(module, "time", clock)
    return clock.threads


@pytest.mark.parametrize("verify", ["pause", "overlapped"])
@pytest.mark.parametrize("keep_previous", [False, True])
def test_a_commit_that_is_late_at_its_boundary_writes_nothing(
    make_engine: Callable[..., ToyEngine],
    late: set[threading.Thread],
    verify: Any,
    keep_previous: bool,
) -> None:
    engine = make_engine(keep_previous=keep_previous)
    with WeightPublisher(engine) as publisher:
        publisher.publish(weights(1.0))
        engine.host.events.clear()
        late.add(engine.host._thread)
        with pytest.raises(DeadlineExceeded, match="commit of version 2: its deadline passed"):
            publisher.publish(weights(2.0), verify=verify)
        assert engine.values() == {1.0} and engine.host.events == []
        info = publisher.engine_info()
        assert (info.version, info.torn) == (1, None) and not engine.receiver.updating
        late.clear()
        assert publisher.publish(weights(3.0), verify=verify).version == 2
        assert engine.values() == {3.0}


def test_a_label_that_is_late_at_its_boundary_is_not_given(
    engine: ToyEngine, late: set[threading.Thread]
) -> None:
    late.add(engine.host._thread)
    channel = engine.weight_channel()
    with pytest.raises(DeadlineExceeded, match="the label 'new': its deadline passed"):
        channel.call(SetLabel(label="new", nonce="1", timeout_s=60.0), 60.0)
    assert engine.receiver.label == "0" and engine.host.events == []
    late.clear()
    channel.call(SetLabel(label="new", nonce="2", timeout_s=60.0), 60.0)
    assert engine.receiver.label == "new"


@pytest.fixture
def whole(tiny_checkpoint: Callable[..., Path]) -> Iterator[Engine]:
    with Engine(tiny_checkpoint("qwen3", head_dim=32), kv_cache_bytes=4 << 20) as engine:
        yield engine


def test_a_command_that_is_late_behind_what_came_before_it_is_not_carried_out(
    whole: Engine, late: set[threading.Thread], monkeypatch: pytest.MonkeyPatch
) -> None:
    core = whole._executor._core  # type: ignore[attr-defined]
    drain = core.pipeline.drain

    def slowly() -> None:
        drain()
        late.add(core._thread)

    with monkeypatch.context() as patched:
        patched.setattr(core.pipeline, "drain", slowly)
        with pytest.raises(DeadlineExceeded, match="was not carried out"):
            whole.pause_generation("in_place")
    late.clear()
    assert whole.status().paused is None
    whole.pause_generation("in_place")
    assert whole.status().paused == "in_place"


def test_what_came_behind_something_long_is_taken_and_looked_at_when_that_is_done() -> None:
    queued = Inbox()
    bodies = [cmd.FlushCache(), cmd.ReleaseMemory(tags=["kv_cache"]), cmd.GetStatus()]
    for body in bodies:
        queued.put_call(NullCall(body))
    queued.put(Boundary(name="write"))
    queued.put_call(NullCall(cmd.ContinueGeneration()))
    taken = [[call.body for _, call in queued.take(0.0)] for _ in range(4)]
    assert taken[0] == bodies[:2]
    assert taken[1] == [cmd.GetStatus(), Boundary(name="write")]
    assert taken[2:] == [[cmd.ContinueGeneration()], []]
    for body in bodies:
        queued.put_call(NullCall(body))
    queued.take(0.0)
    left: list[Any] = []
    queued.drain(left.append)
    assert [call.body for call in left] == bodies[2:]


def test_an_abort_ends_a_commit_that_waits_also_where_ranks_have_a_name_of_their_own_for_it(
    engine: ToyEngine,
) -> None:
    front = LeadingWeights(engine.service, [], on_lost=lambda error: None)
    server = RpcServer(front.handle, WeightRequest)
    server.start()

    class Ranked:
        def weight_channel(self) -> Any:
            client = RpcClient(server.address, WeightReply, errors=ERRORS)
            return RpcChannel(client, owned=True)

    errors: list[BaseException] = []
    with WeightPublisher(Ranked(), timeout_s=60.0) as publisher:
        publisher.begin()
        publisher.send(weights(1.0))
        engine.host.blocked.set()

        def commit() -> None:
            try:
                publisher.commit()
            except SyncError as error:
                errors.append(error)

        update = publisher._update
        assert update is not None
        committing = threading.Thread(target=commit)
        committing.start()
        waits = f"commit/{update.session_id}."
        assert eventually(lambda: any(str(n).startswith(waits) for n in engine.host.waiting), 30.0)
        update.tell_abort("not wanted any more")
        committing.join(30.0)
        assert not committing.is_alive()
        engine.host.blocked.clear()
        assert [type(error) for error in errors] == [DeadlineExceeded]
        assert engine.values() == {0.0} and engine.receiver.version == 0
    server.close()
    front.close()
