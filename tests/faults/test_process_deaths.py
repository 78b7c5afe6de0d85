"""kill -9 of a real trainer and of a real engine, in each phase of an update."""

from __future__ import annotations

import gc
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from shm import shm_names
from sync_support import (
    ToyEngine,
    arenas_mapped,
    eventually,
    kill,
    num_descriptors,
    read_line,
    weights,
)

from weight_sync import EngineDiedError, SessionBusy, WeightPublisher


@pytest.mark.parametrize("phase", ["begin", "stage", "vote", "commit"])
def test_a_trainer_that_is_killed_leaves_one_whole_version_and_no_session(
    make_engine: Callable[..., ToyEngine], child: Callable[..., Any], phase: str
) -> None:
    engine = make_engine(serve=True)
    with WeightPublisher(engine) as first:
        first.publish(weights(1.0))
    assert eventually(lambda: not engine.receiver._arenas)
    descriptors, mapped, names = num_descriptors(), arenas_mapped(), shm_names()
    if phase == "commit":
        engine.host.blocked.set()
        engine.host.waiting.clear()
    trainer = child("trainer_process.py", engine.address, phase)
    assert read_line(trainer) == "ready"
    streams = sum(stream is not None for stream in (trainer.stdin, trainer.stdout))
    if phase != "commit":
        with (
            WeightPublisher(engine.address) as other,
            pytest.raises(SessionBusy, match=str(trainer.pid)),
        ):
            other.publish(weights(3.0))
    else:
        assert eventually(lambda: any(name and "commit" in name for name in engine.host.waiting))
    kill(trainer)
    engine.host.blocked.clear()
    with WeightPublisher(engine.address) as other:
        start = time.monotonic()
        report = other.publish(weights(3.0))
        # Not a lease, of a minute: the dead trainer's session goes at once.
        assert time.monotonic() - start < 20.0
        assert report.version == (3 if phase == "commit" else 2)
    assert engine.values() == {3.0}
    assert eventually(lambda: not engine.receiver._arenas)
    assert eventually(lambda: num_descriptors() <= descriptors + streams)
    assert arenas_mapped() == mapped and shm_names() <= names


def test_a_session_of_a_dead_trainer_ends_although_nobody_asks(
    make_engine: Callable[..., ToyEngine], child: Callable[..., Any]
) -> None:
    engine = make_engine(serve=True)
    gc.collect()
    mapped = arenas_mapped()
    trainer = child("trainer_process.py", engine.address, "stage")
    assert read_line(trainer) == "ready"
    assert engine.receiver._session is not None and arenas_mapped() == mapped + 1
    kill(trainer)
    assert eventually(lambda: engine.receiver._session is None, 20.0)
    assert eventually(lambda: arenas_mapped() == mapped, 20.0)
    assert engine.values() == {0.0} and engine.receiver.version == 0


def test_an_engine_that_is_killed_fails_calls_at_once_and_its_successor_takes_updates(
    child: Callable[..., Any], tmp_path: Path
) -> None:
    address = f"ipc://{tmp_path}/socket"
    engine = child("engine_process.py", address)
    assert read_line(engine) == address
    publisher = WeightPublisher(address, timeout_s=60)
    publisher.publish(weights(1.0))
    engine.stdin.write("block\n")
    engine.stdin.flush()
    read_line(engine)
    failure: list[BaseException] = []

    def publish() -> None:
        try:
            publisher.publish(weights(2.0))
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=publish)
    thread.start()
    time.sleep(0.3)  # the commit waits for a step boundary that does not come
    assert thread.is_alive()
    start = time.monotonic()
    kill(engine)
    thread.join(30)
    assert not thread.is_alive() and time.monotonic() - start < 20.0
    assert isinstance(failure[0], EngineDiedError)

    successor = child("engine_process.py", address)
    assert read_line(successor) == address
    report = publisher.publish(weights(5.0))
    assert report.version == 1
    successor.stdin.write("state\n")
    successor.stdin.flush()
    state = json.loads(read_line(successor))
    assert state["values"] == [5.0] and state["mixtures"] == []
    publisher.close()


def test_an_engine_that_never_lived_is_an_error_in_seconds(tmp_path: Path) -> None:
    publisher = WeightPublisher(f"ipc://{tmp_path}/nobody", timeout_s=0.4)
    with pytest.raises((EngineDiedError, TimeoutError)):
        publisher.publish(weights(1.0))
    publisher.close()
