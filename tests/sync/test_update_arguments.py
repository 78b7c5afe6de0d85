"""What is passed beside the tensors of an update: taken in any library's numbers, or refused before anything happens.

An engine of the caller's process could take what no message can carry, and then not tell it to clients elsewhere.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from sync_support import ToyEngine, weights

from weight_sync import ManifestMismatch, WeightPublisher, WeightUpdateError
from weight_sync.publisher.group_updates import GroupUpdates


def test_numbers_of_other_libraries_are_numbers(engine: ToyEngine) -> None:
    with WeightPublisher(engine, timeout_s=np.float64(20.0)) as publisher:
        assert publisher.publish(weights(1.0), version=np.int64(3)).version == 3
        report = publisher.publish(weights(2.0), version=torch.tensor(5), base_version=np.int32(3))
        assert type(report.version) is int
        msgspec.msgpack.encode(publisher.engine_info())  # as a client elsewhere gets it


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("version", True),
        ("version", 2.5),
        ("version", "7"),
        ("version", -1),
        ("version", 2**62 + 1),
        ("base_version", 0.0),
        ("label", "x" * 513),
        ("label", "\ud800"),
        ("expected_fingerprints", 5),
        ("expected_fingerprints", {"norm.weight": "5"}),
        ("timeout_s", float("nan")),
        ("timeout_s", float("inf")),
        ("timeout_s", "10"),
        ("timeout_s", 0),
        ("timeout_s", 8 * 86_400),
    ],
)
def test_what_no_message_can_carry_is_refused_by_name(
    engine: ToyEngine, name: str, value: Any
) -> None:
    with WeightPublisher(engine, timeout_s=20.0) as publisher:
        with pytest.raises((WeightUpdateError, ValueError), match=name):
            publisher.publish(weights(1.0), **{name: value})
        if name not in ("timeout_s", "expected_fingerprints"):
            with pytest.raises(WeightUpdateError, match=name):
                publisher.begin(**{name: value})
        assert not publisher.in_session and engine.values() == {0.0}
        assert publisher.publish(weights(1.0)).version == 1


def test_a_lease_and_a_publishers_limit_are_limits(engine: ToyEngine) -> None:
    for limit in (0, float("nan"), float("inf"), "10"):
        with pytest.raises(ValueError, match="timeout_s"):
            WeightPublisher(engine, timeout_s=limit)  # type: ignore[arg-type]
        with WeightPublisher(engine) as publisher, pytest.raises(ValueError, match="lease_s"):
            publisher.begin(lease_s=limit)  # type: ignore[arg-type]


@pytest.mark.parametrize("nothing", [None, 7, 1.5, object()])
def test_what_holds_no_tensors_is_refused_in_words(engine: ToyEngine, nothing: Any) -> None:
    with WeightPublisher(engine, timeout_s=20.0) as publisher:
        with pytest.raises(ManifestMismatch, match="named_tensors: got"):
            publisher.publish(nothing)
        assert publisher.publish(weights(1.0)).version == 1


@pytest.mark.parametrize("name", ["\ud800", "x" * 600, "\U0001f600" * 200])
def test_a_name_that_no_message_carries_is_unknown(
    make_engine: Callable[..., ToyEngine], name: str
) -> None:
    engine = make_engine(serve=True)
    with WeightPublisher(engine.address, timeout_s=20.0) as publisher:
        with pytest.raises(ManifestMismatch, match="unknown to the engine"):
            publisher.publish({**weights(1.0), name: torch.zeros(2)})
        assert publisher.publish(weights(1.0)).version == 1


def test_a_buffer_that_nobody_comes_for_is_not_kept(engine: ToyEngine) -> None:
    """Of an update that gave up between lending it and opening it."""
    buffer = torch.zeros(8, dtype=torch.uint8)
    held = weakref.ref(buffer)
    engine.service.lend(buffer)
    assert held() is buffer
    del buffer
    assert held() is None


def test_an_interrupted_wait_for_a_turn_leaves_the_turn_to_others(
    engine: ToyEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    updates = GroupUpdates(engine, timeout_s=5.0)

    class Interrupted(threading.Event):
        def set(self) -> None:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("weight_sync.publisher.group_updates.threading.Event", Interrupted)
        with pytest.raises(KeyboardInterrupt), updates._turn():
            pass
    with updates._turn():
        pass
    updates.close()
