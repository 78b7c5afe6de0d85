"""Updates that are interrupted, cancelled, collected or forked leave no session, no arena and no mixture behind."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sync_support import ToyEngine, arenas_mapped, eventually, num_descriptors, weights

from weight_sync.errors import (
    ArenaGoneError,
    DeadlineExceeded,
    ForkedProcessError,
    SessionBusy,
    SessionError,
    SyncError,
    TransportError,
)
from weight_sync.publisher.publisher import WeightPublisher
from weight_sync.receiver.arena_table import MAX_ARENAS

PUBLISHER = str(Path(sys.modules["weight_sync.publisher.publisher"].__file__ or "").parent)


def publish_soon(target: Any, value: float, timeout_s: float = 1.0) -> int:
    """Version of a publish by somebody else, who waits at most so long for the session of another."""
    end = time.monotonic() + timeout_s
    with WeightPublisher(target, timeout_s=10.0) as other:
        while True:
            try:
                return other.publish(weights(value)).version
            except SessionBusy:
                if time.monotonic() > end:
                    raise
                time.sleep(0.01)


# ---- interrupts ----------------------------------------------------------------------------------


@contextlib.contextmanager
def interrupts(*at: int) -> Iterator[None]:
    """Ctrl-C when this thread comes to these lines of the publisher, by count."""
    count, due = 0, sorted(at)

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        if not frame.f_code.co_filename.startswith(PUBLISHER):
            return None
        if event == "line":
            count += 1
            if due and count >= due[0]:
                due.pop(0)
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


@pytest.fixture(scope="module")
def served() -> Iterator[ToyEngine]:
    engine = ToyEngine(serve=True)
    yield engine
    engine.close()
    assert engine.host.mixtures == []


@pytest.mark.parametrize("by", ["object", "address"])
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(one=st.integers(1, 460), later=st.none() | st.integers(1, 60), one_shot=st.booleans())
def test_ctrl_c_at_any_line_of_a_publish_once_or_twice_leaves_the_engine_free_and_whole(
    by: str, served: ToyEngine, one: int, later: int | None, one_shot: bool
) -> None:
    target = served if by == "object" else served.address
    tensors = weights(2.0)
    with WeightPublisher(target, timeout_s=60.0) as publisher:
        publisher.publish(weights(1.0))
        at = [one] if later is None else [one, one + later]
        before = served.receiver.version
        start = time.monotonic()
        with interrupts(*at), contextlib.suppress(KeyboardInterrupt):
            publisher.publish(iter(tensors.items()) if one_shot else tensors)
        assert time.monotonic() - start < 30.0
        assert served.receiver.version in (before, before + 1)
        assert len(served.values()) == 1
        publisher.publish(weights(3.0))
        assert served.values() == {3.0}
    assert served.receiver.torn is None
    publish_soon(target, 4.0)


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """A signal that interrupts: whoever runs tests in the background may have had it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_the_first_ctrl_c_while_a_commit_waits_returns_soon_and_nothing_commits(
    engine: ToyEngine, ctrl_c: None
) -> None:
    publisher = WeightPublisher(engine, timeout_s=60.0)
    publisher.publish(weights(1.0))
    engine.host.blocked.set()
    engine.host._actions.put(lambda: None)  # the loop hangs in front of it
    engine.host.waiting.clear()

    def interrupt() -> None:
        assert eventually(lambda: any(name and "commit" in name for name in engine.host.waiting))
        os.kill(os.getpid(), signal.SIGINT)

    interrupting = threading.Thread(target=interrupt)
    interrupting.start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        publisher.publish(weights(2.0))
    assert time.monotonic() - start < 20.0
    interrupting.join()
    engine.host.blocked.clear()
    assert publisher.publish(weights(3.0)).version == 2
    assert engine.values() == {3.0}
    publisher.close()


# ---- cancelling ----------------------------------------------------------------------------------


def test_a_cancelled_publish_has_ended_its_session_when_the_coroutine_ends(
    engine: ToyEngine,
) -> None:
    publisher = WeightPublisher(engine, timeout_s=60.0)
    publisher.publish(weights(1.0))
    packed = threading.Event()

    def slowly() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in weights(2.0).items():
            yield name, tensor
            packed.set()
            time.sleep(0.05)

    async def cancel() -> None:
        task = asyncio.create_task(publisher.async_publish(slowly()))
        while not packed.is_set():
            await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not engine.receiver.updating
        other = WeightPublisher(engine, timeout_s=60.0)
        assert (await other.async_publish(weights(3.0))).version == 2
        other.close()

    asyncio.run(cancel())
    assert publisher.publish(weights(4.0)).version == 3
    assert engine.values() == {4.0}
    publisher.close()


def test_a_publish_that_is_cancelled_while_its_commit_waits_never_commits(
    engine: ToyEngine,
) -> None:
    publisher = WeightPublisher(engine, timeout_s=60.0)
    publisher.publish(weights(1.0))

    async def cancel() -> None:
        engine.host.blocked.set()
        engine.host._actions.put(lambda: None)
        task = asyncio.create_task(publisher.async_publish(weights(2.0)))
        while not any(name and "commit" in name for name in engine.host.waiting):
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.05)
        task.cancel()
        start = time.monotonic()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert time.monotonic() - start < 20.0

    engine.host.waiting.clear()
    asyncio.run(cancel())
    engine.host.blocked.clear()
    assert eventually(lambda: not engine.receiver.updating)
    assert engine.receiver.version == 1
    assert publisher.publish(weights(3.0)).version == 2
    publisher.close()


def test_cancelling_inside_an_iterator_that_hangs_ends_the_session_all_the_same(
    engine: ToyEngine,
) -> None:
    publisher = WeightPublisher(engine, timeout_s=60.0)
    inside, go_on = threading.Event(), threading.Event()

    def hanging() -> Iterator[tuple[str, torch.Tensor]]:
        yield from list(weights(2.0).items())[:3]
        inside.set()
        go_on.wait(20)
        yield from list(weights(2.0).items())[3:]

    async def cancel() -> None:
        task = asyncio.create_task(publisher.async_publish(hanging()))
        while not inside.is_set():
            await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not engine.receiver.updating
        go_on.set()

    asyncio.run(cancel())
    assert publisher.publish(weights(3.0)).version == 1
    assert engine.values() == {3.0}
    publisher.close()


# ---- leases and limits ---------------------------------------------------------------------------


def test_the_lease_follows_the_timeout_whoever_sets_it(
    engine: ToyEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    leases: list[float] = []
    begin = engine.receiver.begin
    monkeypatch.setattr(
        engine.service,
        "_actions",
        engine.service._actions
        | {k: v for k, v in engine.service._actions.items() if k.__name__ != "Begin"}
        | {
            k: lambda message: (leases.append(message.lease_s), begin(message))[1]
            for k in engine.service._actions
            if k.__name__ == "Begin"
        },
    )
    with WeightPublisher(engine, timeout_s=200.0) as publisher:
        publisher.publish(weights(1.0))
        publisher.publish(weights(1.0), timeout_s=300.0)
        publisher.begin()
        publisher.abort()
        publisher.begin(lease_s=5.0)
        publisher.abort()
    assert set(leases) == {200.0, 300.0, 5.0}


def test_a_publish_with_a_short_limit_ends_by_it_and_a_slow_iterator_may_take_what_it_was_given(
    engine: ToyEngine,
) -> None:
    def slowly(pause_s: float) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in weights(2.0).items():
            time.sleep(pause_s)
            yield name, tensor

    with WeightPublisher(engine, timeout_s=0.2) as publisher:
        with pytest.raises(SyncError):
            publisher.publish(slowly(0.06))
        assert publisher.publish(slowly(0.06), timeout_s=20.0).version == 1


def test_a_call_waits_for_its_turn_no_longer_than_its_limit(engine: ToyEngine) -> None:
    publisher = WeightPublisher(engine, timeout_s=60.0)
    inside, go_on = threading.Event(), threading.Event()

    def hanging() -> Iterator[tuple[str, torch.Tensor]]:
        inside.set()
        go_on.wait(20)
        yield from weights(1.0).items()

    first = threading.Thread(target=publisher.publish, args=(hanging(),))
    first.start()
    assert inside.wait(20)
    with pytest.raises(DeadlineExceeded, match="another call"):
        publisher.publish(weights(2.0), timeout_s=0.1)
    go_on.set()
    first.join()
    publisher.close()


# ---- arenas --------------------------------------------------------------------------------------


def test_an_arena_that_the_engine_has_lost_is_opened_again(make_engine: Callable[..., Any]) -> None:
    engine = make_engine(serve=True)
    for target in (engine, engine.address):
        with WeightPublisher(target, timeout_s=60.0) as publisher:
            first = publisher.publish(weights(1.0)).version
            for arena_id in engine.receiver._arenas.ids():
                engine.receiver.close_arena(arena_id)
            assert publisher.publish(weights(2.0)).version == first + 1
            for arena_id in engine.receiver._arenas.ids():
                engine.receiver.close_arena(arena_id)
            publisher.begin()
            publisher.send(weights(3.0))
            assert publisher.commit().version == first + 2
            assert engine.values() == {3.0}


def test_ids_of_one_engine_mean_nothing_to_the_next_at_the_same_address(
    make_engine: Callable[..., Any], tmp_path: Path
) -> None:
    bind = f"ipc://{tmp_path}/socket"
    old = make_engine(serve=True, bind=bind)
    returning = WeightPublisher(bind, timeout_s=60.0)
    returning.publish(weights(1.0))
    old.close()
    new = make_engine(serve=True, bind=bind)
    with WeightPublisher(bind, timeout_s=60.0) as other:
        other.publish(weights(2.0))
        (opened,) = new.receiver._arenas.ids()
        returning.publish(weights(3.0))  # it gives up the arena that the old engine had
        assert opened in new.receiver._arenas.ids()
        assert other.publish(weights(4.0)).version == 3
    returning.close()


@given(st.integers(1, 5))
@settings(max_examples=3, deadline=None)
def test_no_two_engines_give_an_arena_the_same_id(num_opened: int) -> None:
    engines = [ToyEngine(), ToyEngine()]
    publishers = [WeightPublisher(engine) for engine in engines for _ in range(num_opened)]
    for publisher in publishers:
        publisher.publish(weights(1.0))
    ids = [i for engine in engines for i in engine.receiver._arenas.ids()]
    assert len(set(ids)) == 2 * num_opened
    with pytest.raises(ArenaGoneError, match="open it again"):
        engines[0].receiver._arenas.get(ids[-1])
    for thing in (*publishers, *engines):
        thing.close()


def test_publishers_that_nobody_closed_are_closed_when_they_are_collected(
    make_engine: Callable[..., Any],
) -> None:
    engine = make_engine(serve=True)
    WeightPublisher(engine.address).publish(weights(0.5))
    gc.collect()
    before = num_descriptors(), threading.active_count()
    for target in (engine, engine.address):
        for i in range(MAX_ARENAS + 4):
            publisher = WeightPublisher(target)
            publisher.publish(weights(float(i)))
            if i % 2:
                publisher.begin()  # also with a session open
            publisher.cycle = publisher  # type: ignore[attr-defined]  # found by the collector alone
            del publisher
            gc.collect()
    assert eventually(lambda: len(engine.receiver._arenas) == 0)
    assert eventually(lambda: (num_descriptors(), threading.active_count()) <= before)
    assert eventually(lambda: arenas_mapped() == 0)
    assert publish_soon(engine, 9.0) > 0


def test_the_refusal_of_one_arena_too_many_names_who_holds_them(engine: ToyEngine) -> None:
    publishers = [WeightPublisher(engine) for _ in range(MAX_ARENAS + 1)]
    with pytest.raises(TransportError, match=rf"{MAX_ARENAS} of process {os.getpid()}"):
        for publisher in publishers:
            publisher.publish(weights(1.0))
    for publisher in publishers:
        publisher.close()


# ---- forks ---------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded")
def test_a_forked_child_can_neither_use_nor_close_its_parents_publisher(
    make_engine: Callable[..., Any],
) -> None:
    engine = make_engine(serve=True)
    for target in (engine, engine.address):
        with WeightPublisher(target, timeout_s=600.0) as publisher:
            version = publisher.publish(weights(1.0)).version
            pid = os.fork()
            if pid == 0:
                signal.alarm(10)
                try:
                    for call in (publisher.engine_info, lambda: publisher.publish(weights(5.0))):
                        with pytest.raises(ForkedProcessError):
                            call()
                    publisher.close()
                    publisher._finalizer()
                    os._exit(0)
                finally:
                    os._exit(1)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
            assert publisher.publish(weights(2.0)).version == version + 1


def test_a_session_that_was_cancelled_says_so_to_whoever_goes_on_with_it(
    engine: ToyEngine,
) -> None:
    with WeightPublisher(engine) as publisher:
        publisher.begin()
        publisher.abort("the trainer gave up")
        with pytest.raises(SessionError, match="no session is open"):
            publisher.commit()
