"""Replicas of a pool that answer later than the trainer waits: their sessions end, what they have written counts."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from fleet_of_toys import Fleet
from sync_support import ToyEngine, eventually, weights

from weight_sync import WeightPublisher, WeightUpdateError
from weight_sync.errors import DeadlineExceeded
from weight_sync.wire.messages import Begin, Vote


@pytest.fixture
def publisher(fleet: Fleet) -> Iterator[WeightPublisher]:
    with WeightPublisher(fleet, timeout_s=60.0) as publisher:
        yield publisher


def slow(engine: ToyEngine, kind: type, seconds: float) -> None:
    """From now on the engine takes its time over messages of a kind, before it carries them out."""
    action = engine.service._actions[kind]

    def act(message: Any) -> Any:
        time.sleep(seconds)
        return action(message)

    engine.service._actions[kind] = act


@pytest.mark.parametrize("kind", [Begin, Vote])
def test_what_one_replica_answers_too_late_ends_there_too(
    fleet: Fleet, publisher: WeightPublisher, kind: type
) -> None:
    publisher.publish(weights(1.0))
    original = fleet.engines[1].service._actions[kind]
    slow(fleet.engines[1], kind, 0.8)
    publisher._timeout_s = 0.5
    with pytest.raises(DeadlineExceeded):
        publisher.publish(weights(2.0))
    publisher._timeout_s = 60.0
    fleet.engines[1].service._actions[kind] = original
    assert eventually(lambda: all(engine.receiver._session is None for engine in fleet.engines))
    publisher.publish(weights(3.0))
    assert fleet.values == [{3.0}] * 3 and fleet.weights.serving == {0, 1, 2}


@pytest.mark.parametrize("late", [{0, 1, 2}, {1}, {0, 2}])
def test_what_replicas_commit_later_than_the_trainer_waits_is_what_the_pool_serves(
    fleet: Fleet, publisher: WeightPublisher, late: set[int]
) -> None:
    publisher.publish(weights(1.0))
    told = threading.Event()
    for number in range(3):
        if number in late:
            answers_late(fleet.engines[number], told)
        else:
            fleet.engines[number].host.fail_in = "between_steps"
    publisher._timeout_s = 3.0
    with pytest.raises((DeadlineExceeded, WeightUpdateError)):
        publisher.publish(weights(2.0), label="late")
    told.set()
    publisher._timeout_s = 60.0
    for number in sorted({0, 1, 2} & set(fleet.weights.behind)):
        fleet.weights.bring_up(number).result(60)
    assert (fleet.weights.served.version, fleet.weights.served.label) == (2, "late")
    for number in sorted(fleet.weights.behind):
        fleet.weights.bring_up(number).result(60)
    assert fleet.values == [{2.0}] * 3 and fleet.weights.serving == {0, 1, 2}
    assert publisher.publish(weights(3.0)).version == 3
    assert fleet.values == [{3.0}] * 3


def test_a_trainer_that_publishes_again_at_once_gets_the_version_after_the_late_one(
    fleet: Fleet, publisher: WeightPublisher
) -> None:
    publisher.publish(weights(1.0))
    told = threading.Event()
    for engine in fleet.engines:
        answers_late(engine, told)
    publisher._timeout_s = 3.0
    with pytest.raises(DeadlineExceeded):
        publisher.publish(weights(2.0))
    threading.Timer(0.3, told.set).start()
    publisher._timeout_s = 60.0
    assert publisher.publish(weights(3.0)).version == 3
    assert fleet.values == [{3.0}] * 3 and fleet.weights.serving == {0, 1, 2}


def test_a_version_that_a_replica_got_behind_the_pools_back_does_not_end_all_updates(
    fleet: Fleet, publisher: WeightPublisher
) -> None:
    publisher.publish(weights(1.0))
    with fleet.lone(2) as lone:
        lone.publish(weights(9.0), version=20)
    assert publisher.publish(weights(2.0)).version == 21
    assert fleet.values == [{2.0}] * 3 and fleet.weights.serving == {0, 1, 2}


def answers_late(engine: ToyEngine, told: threading.Event) -> None:
    """It carries the next commit out and does not answer before `told`, when the trainer has given up."""
    original = engine.receiver.commit

    def commit(request: Any, deadline: float) -> Any:
        engine.receiver.commit = original  # type: ignore[method-assign]
        reply = original(request, deadline)
        assert told.wait(60)
        return reply

    engine.receiver.commit = commit  # type: ignore[method-assign]
