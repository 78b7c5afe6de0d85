"""Whatever breaks around a commit: one whole version serves afterwards, or the engine is TORN until it is repaired."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from sync_support import ToyEngine, eventually, weights

import weight_sync
from weight_sync import (
    DeadlineExceeded,
    FingerprintMismatch,
    ManifestMismatch,
    SyncError,
    TornWeightsError,
    WeightPublisher,
    WeightUpdateError,
)
from weight_sync.plan.plan import Plan

VERIFY = ("pause", "overlapped")


@pytest.fixture(params=["local", "served"])
def make(
    request: pytest.FixtureRequest, make_engine: Callable[..., ToyEngine]
) -> Iterator[Callable[..., tuple[ToyEngine, WeightPublisher]]]:
    """An engine at version 1, all ones, and its publisher."""
    publishers: list[WeightPublisher] = []

    def make(**options: Any) -> tuple[ToyEngine, WeightPublisher]:
        engine = make_engine(serve=request.param == "served", **options)
        publisher = WeightPublisher(engine, timeout_s=60)
        publishers.append(publisher)
        publisher.publish(weights(1.0))
        engine.host.events.clear()
        return engine, publisher

    yield make
    for publisher in publishers:
        publisher.close()


def plan_of(engine: ToyEngine) -> Plan:
    return engine.receiver._plans.canonical.plan


def break_replay(engine: ToyEngine, how: Callable[[], None]) -> None:
    """The next replay writes everything and then lets `how` loose on the engine."""
    plan = plan_of(engine)
    original = plan.replay

    def replay(*arguments: Any) -> None:
        del plan.replay  # type: ignore[method-assign]
        original(*arguments)
        how()

    plan.replay = replay  # type: ignore[method-assign]


def flip_resident(engine: ToyEngine) -> None:
    engine.weight_map.parameters["norm.weight"].view(torch.uint8)[3] ^= 64


def raise_error() -> None:
    raise RuntimeError("the copy broke")


def assert_serves(engine: ToyEngine, publisher: WeightPublisher, version: int) -> None:
    """Exactly this version, whole; and the next update works."""
    info = publisher.engine_info()
    assert (info.version, info.torn) == (version, None)
    assert engine.values() == {float(version)}
    assert publisher.fingerprint() == weight_sync.fingerprint(weights(float(version)))
    report = publisher.publish(weights(version + 1.0))
    assert report.version == version + 1 and engine.values() == {version + 1.0}


@pytest.mark.parametrize("verify", VERIFY)
@pytest.mark.parametrize("keep_previous", [False, True])
@pytest.mark.parametrize("where", ["between_steps", "hold_outputs"])
def test_a_host_that_raises_before_the_write_changes_nothing(
    make: Callable[..., Any], verify: Any, keep_previous: bool, where: str
) -> None:
    engine, publisher = make(keep_previous=keep_previous)
    engine.host.fail_in = where
    if where == "hold_outputs" and verify == "pause":
        publisher.publish(weights(2.0), verify=verify)  # never called
        engine.host.fail_in = None
        assert_serves(engine, publisher, 2)
        return
    with pytest.raises(WeightUpdateError, match=f"{where} broke on purpose; version 1 serves"):
        publisher.publish(weights(2.0), verify=verify)
    assert engine.host.events == []
    assert_serves(engine, publisher, 1)


@pytest.mark.parametrize("verify", VERIFY)
@pytest.mark.parametrize("damage", ["flip", "raise", "weights_written"])
def test_with_a_kept_copy_a_failure_inside_the_write_rolls_back(
    make: Callable[..., Any], verify: Any, damage: str
) -> None:
    engine, publisher = make(keep_previous=True)
    engine.host.looks = damage != "flip" or verify != "overlapped"  # one bad word, held back
    addresses = engine.addresses
    if damage == "weights_written":
        engine.host.fail_in = "weights_written"
    else:
        how = (lambda: flip_resident(engine)) if damage == "flip" else raise_error
        break_replay(engine, how)
    kind = FingerprintMismatch if damage == "flip" else WeightUpdateError
    with pytest.raises(kind, match="version 1 was restored and serves") as caught:
        publisher.publish(weights(2.0), verify=verify)
    assert not isinstance(caught.value, TornWeightsError)
    if damage == "flip":
        assert "norm.weight: got 0x" in str(caught.value)
    assert ("written", 1, "1", "flush") in engine.host.events
    assert (("release", False) in engine.host.events) == (verify == "overlapped")
    assert engine.addresses == addresses
    engine.host.looks = True
    assert_serves(engine, publisher, 1)


@pytest.mark.parametrize("verify", VERIFY)
@pytest.mark.parametrize("damage", ["flip", "raise", "weights_written"])
def test_without_a_kept_copy_the_engine_is_torn_until_a_complete_update(
    make: Callable[..., Any], verify: Any, damage: str
) -> None:
    engine, publisher = make()
    engine.host.looks = damage != "flip" or verify != "overlapped"
    if damage == "weights_written":
        engine.host.fail_in = "weights_written"
    else:
        how = (lambda: flip_resident(engine)) if damage == "flip" else raise_error
        break_replay(engine, how)
    with pytest.raises(TornWeightsError, match="no copy of the previous version was kept"):
        publisher.publish(weights(2.0), verify=verify)
    assert engine.host.torn is not None and "torn" in engine.host.events
    info = publisher.engine_info()
    assert info.version == 1 and info.torn == engine.receiver.torn
    with contextlib.suppress(TornWeightsError):
        publisher.publish({"norm.weight": weights(1.0)["norm.weight"]}, strict=False)
    assert publisher.engine_info().torn is not None  # a part does not make it whole
    assert engine.host.torn is not None
    report = publisher.publish(weights(3.0), kv_policy="keep")
    assert engine.host.torn is None and publisher.engine_info().torn is None
    assert engine.host.events[-1] == ("written", report.version, report.label, "flush")
    assert engine.values() == {3.0}


def test_a_roll_back_that_fails_as_well_is_torn(make: Callable[..., Any]) -> None:
    engine, publisher = make(keep_previous=True)

    def break_both() -> None:
        engine.host.fail_in = "weights_written"
        raise RuntimeError("the copy broke")

    break_replay(engine, break_both)
    with pytest.raises(TornWeightsError, match="and so did the roll-back"):
        publisher.publish(weights(2.0))
    publisher.publish(weights(3.0))
    assert engine.values() == {3.0} and engine.receiver.torn is None


def test_a_restored_copy_that_is_not_the_old_version_is_torn(make: Callable[..., Any]) -> None:
    engine, publisher = make(keep_previous=True)

    def break_copy() -> None:
        engine.receiver._snapshot._kept[0].flatten()[0] += 1  # type: ignore[union-attr]
        raise RuntimeError("the copy broke")

    break_replay(engine, break_copy)
    with pytest.raises(TornWeightsError, match="not those of the previous version"):
        publisher.publish(weights(2.0))


def test_an_overlapped_update_that_cannot_be_undone_is_torn(
    make_engine: Callable[..., ToyEngine],
) -> None:
    engine = make_engine(keep_previous=True)
    publisher = WeightPublisher(engine, timeout_s=60)
    engine.host.look_away()

    def flip_and_block() -> None:
        flip_resident(engine)
        engine.host.blocked.set()

    break_replay(engine, flip_and_block)
    with pytest.raises((TornWeightsError, DeadlineExceeded)):
        publisher.publish(weights(2.0), verify="overlapped", timeout_s=4.0)
    assert eventually(lambda: engine.receiver.torn is not None)
    assert engine.host.events[-2:] == ["torn", ("release", False)]
    engine.host.blocked.clear()
    publisher.publish(weights(3.0))
    assert engine.values() == {3.0}


@pytest.mark.parametrize("verify", VERIFY)
def test_a_byte_that_changes_in_the_arena_before_the_check_is_refused_by_name(
    make: Callable[..., Any], verify: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, publisher = make()
    stage = engine.receiver.stage

    def corrupt_first(bucket: Any) -> Any:
        monkeypatch.undo()
        session = engine.receiver._session
        assert session is not None
        row = session.manifest.index["layers.0.v.weight"]
        packed = publisher._endpoint._packed
        assert packed is not None
        packed.views[row].view(torch.uint8)[2, 5] ^= 1
        return stage(bucket)

    monkeypatch.setitem(engine.service._actions, weight_sync.wire.messages.Bucket, corrupt_first)
    with pytest.raises(
        FingerprintMismatch, match=r"staged bytes of 1 tensors(.|\n)*layers.0.v.weight"
    ):
        publisher.publish(weights(2.0), verify=verify)
    assert engine.host.events == []
    assert_serves(engine, publisher, 1)


@pytest.mark.parametrize("keep_previous", [False, True])
def test_a_byte_that_changes_in_the_arena_after_the_vote_never_serves(
    make: Callable[..., Any], keep_previous: bool
) -> None:
    engine, publisher = make(keep_previous=keep_previous)
    publisher.begin()
    publisher.send(weights(2.0))
    packed = publisher._endpoint._packed
    assert packed is not None
    packed.buffer[10] ^= 1
    kind = FingerprintMismatch if keep_previous else TornWeightsError
    with pytest.raises(kind, match=r"resident bytes of 1 tensors"):
        publisher.commit()
    if keep_previous:
        assert_serves(engine, publisher, 1)
    else:
        publisher.publish(weights(3.0))
        assert engine.values() == {3.0}


def test_a_deadline_before_the_step_boundary_leaves_the_old_version(
    make: Callable[..., Any],
) -> None:
    engine, publisher = make()
    impatient = WeightPublisher(engine, timeout_s=0.3)
    engine.host.blocked.set()
    start = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        impatient.publish(weights(2.0))
    assert time.monotonic() - start < 30
    engine.host.blocked.clear()
    time.sleep(0.05)
    assert_serves(engine, publisher, 1)
    impatient.close()


@pytest.mark.parametrize("phase", ["begin", "stage", "commit"])
def test_a_receiver_that_raises_in_any_phase_is_an_error_and_no_more(
    make: Callable[..., Any], phase: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, publisher = make()
    if phase == "commit":
        monkeypatch.setattr(
            type(engine.receiver), "prepare", lambda *_: raise_error(), raising=True
        )
    else:
        kind = {
            "begin": weight_sync.wire.messages.Begin,
            "stage": weight_sync.wire.messages.Bucket,
        }[phase]
        monkeypatch.setitem(engine.service._actions, kind, lambda _: raise_error())
    with pytest.raises((SyncError, RuntimeError), match="the copy broke"):
        publisher.publish(weights(2.0))
    monkeypatch.undo()
    assert_serves(engine, publisher, 1)


def test_problems_of_every_kind_are_found_before_the_first_byte(make: Callable[..., Any]) -> None:
    engine, publisher = make()
    missing = weights(2.0)
    del missing["norm.weight"]
    for bad in (
        missing,
        weights(2.0) | {"unknown": torch.zeros(1)},
        weights(2.0) | {"norm.weight": torch.zeros(3, dtype=torch.bfloat16)},
        [*weights(2.0).items(), *weights(2.0).items()],
    ):
        for form in (lambda b: b, lambda b: iter(list(b.items() if isinstance(b, dict) else b))):
            with pytest.raises(ManifestMismatch):
                publisher.publish(form(bad))
    assert engine.host.events == []
    assert_serves(engine, publisher, 1)
