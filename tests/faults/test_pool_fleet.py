"""One update for many engines: all serve the new version, or none, or those that do not are known to be behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from fleet_of_toys import Fleet
from sync_support import ToyEngine, weights

from rollout.pool.fleet import ReplicaMember
from weight_sync import EngineDiedError, WeightPublisher, WeightUpdateError
from weight_sync.errors import (
    FingerprintMismatch,
    ManifestMismatch,
    ProtocolError,
    SessionBusy,
    SessionError,
    StaleVersionError,
    TornWeightsError,
)
from weight_sync.wire.messages import Bucket


@pytest.fixture
def publisher(fleet: Fleet) -> Iterator[WeightPublisher]:
    with WeightPublisher(fleet, timeout_s=20.0) as publisher:
        yield publisher


def test_one_publish_reaches_every_replica_ten_times_in_a_row(
    fleet: Fleet, publisher: WeightPublisher
) -> None:
    for step in range(1, 11):
        report = publisher.publish(weights(float(step)), label=f"step {step}")
        assert (report.version, report.label, report.complete) == (step, f"step {step}", True)
        assert fleet.values == [{float(step)}] * 3 and fleet.versions == [step] * 3
        assert publisher.fingerprint() == report.fingerprint
    assert len(fleet.members[0].arenas) == 1  # The one arena was opened once.


def test_a_session_of_several_parts_commits_everywhere_or_nowhere(
    fleet: Fleet, publisher: WeightPublisher
) -> None:
    parts = list(weights(4.0).items())
    with publisher.session() as session:
        for name, tensor in parts:
            session.send([(name, tensor)])
        assert fleet.values == [{0.0}] * 3
    assert fleet.values == [{4.0}] * 3
    with pytest.raises(RuntimeError, match="stop"), publisher.session(strict=False) as session:
        session.send(parts[:2])
        raise RuntimeError("stop")
    publisher.publish(weights(5.0))
    assert fleet.values == [{5.0}] * 3 and fleet.versions == [2] * 3


def test_what_one_replica_refuses_before_the_commit_changes_nothing_anywhere(
    fleet: Fleet, publisher: WeightPublisher
) -> None:
    publisher.publish(weights(1.0))
    with fleet.lone(1) as lone:
        lone.begin()
        with pytest.raises(SessionBusy):
            publisher.publish(weights(2.0))
        lone.abort()
    assert fleet.values == [{1.0}] * 3 and fleet.weights.serving == {0, 1, 2}
    publisher.publish(weights(3.0))
    assert fleet.values == [{3.0}] * 3


def test_one_vote_against_it_keeps_all_from_committing(
    fleet: Fleet, publisher: WeightPublisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher.publish(weights(1.0))
    monkeypatch.setattr(fleet.engines[1].host, "unwritable", lambda: "a test holds it")
    with pytest.raises(WeightUpdateError, match="a test holds it"):
        publisher.publish(weights(2.0))
    assert fleet.values == [{1.0}] * 3 and fleet.versions == [1] * 3
    monkeypatch.undo()
    publisher.publish(weights(3.0))
    assert fleet.values == [{3.0}] * 3 and fleet.versions == [2] * 3


def test_when_all_are_torn_nobody_serves_until_a_complete_update(
    fleet: Fleet, publisher: WeightPublisher
) -> None:
    publisher.publish(weights(1.0))
    publisher.begin()
    publisher.send(weights(2.0))
    packed = publisher._endpoint._packed
    assert packed is not None
    packed.views[0].fill_(9.0)  # After it was checked: found when it is resident.
    with pytest.raises(TornWeightsError):
        publisher.commit()
    assert fleet.weights.serving == set() and fleet.weights.served.version == 1
    publisher.publish(weights(3.0))
    assert fleet.values == [{3.0}] * 3 and fleet.weights.serving == {0, 1, 2}


@pytest.mark.parametrize("phase", ["idle", "begun", "staged"])
def test_a_replica_that_dies_is_left_out_and_the_others_commit(
    fleet: Fleet, publisher: WeightPublisher, phase: str
) -> None:
    publisher.publish(weights(1.0))
    if phase == "idle":
        fleet.kill(1)
    publisher.begin()
    if phase == "begun":
        fleet.kill(1)
    publisher.send(weights(2.0))
    if phase == "staged":
        fleet.kill(1)
    report = publisher.commit()
    assert report.version == 2 and fleet.versions == [2, 1, 2]
    assert fleet.weights.serving == {0, 2} and isinstance(fleet.weights.behind[1], Exception)
    publisher.publish(weights(3.0))
    assert fleet.values == [{3.0}, {1.0}, {3.0}]


def test_when_all_have_died_the_publisher_is_told_and_the_version_stays(
    fleet: Fleet, publisher: WeightPublisher
) -> None:
    publisher.publish(weights(1.0))
    for number in range(3):
        fleet.kill(number)
    with pytest.raises(EngineDiedError):
        publisher.publish(weights(2.0))
    assert fleet.weights.served.version == 1


def test_a_replica_that_cannot_write_is_behind_until_it_has_caught_up(
    fleet: Fleet, publisher: WeightPublisher
) -> None:
    publisher.publish(weights(1.0))
    fleet.engines[1].host.fail_in = "between_steps"
    report = publisher.publish(weights(2.0))
    assert report.version == 2 and fleet.values == [{2.0}, {1.0}, {2.0}]
    assert fleet.weights.serving == {0, 2} and "on purpose" in str(fleet.weights.behind[1])
    fleet.weights.bring_up(1).result(60)
    assert fleet.values == [{2.0}] * 3 and fleet.weights.serving == {0, 1, 2}
    assert fleet.weights.behind == {}


def test_when_nobody_can_write_the_old_version_goes_on(
    fleet: Fleet, publisher: WeightPublisher
) -> None:
    publisher.publish(weights(1.0))
    for engine in fleet.engines:
        engine.host.fail_in = "between_steps"
    with pytest.raises(WeightUpdateError, match="on purpose"):
        publisher.publish(weights(2.0))
    assert fleet.values == [{1.0}] * 3 and fleet.weights.serving == {0, 1, 2}
    publisher.publish(weights(3.0))
    assert fleet.values == [{3.0}] * 3


def test_a_torn_replica_is_whole_again_once_it_has_caught_up(
    fleet: Fleet, publisher: WeightPublisher
) -> None:
    publisher.publish(weights(1.0))
    fleet.engines[2].host.fail_in = "weights_written"
    publisher.publish(weights(2.0))
    assert fleet.engines[2].receiver.torn is not None and fleet.weights.serving == {0, 1}
    fleet.weights.bring_up(2).result(60)
    assert fleet.engines[2].receiver.torn is None and fleet.values == [{2.0}] * 3


# ---- newcomers -------------------------------------------------------------------------------------------------------


def test_a_newcomer_gets_the_served_version_from_the_publishers_arena(
    fleet: Fleet, publisher: WeightPublisher
) -> None:
    publisher.publish(weights(1.0))
    publisher.publish(weights(2.0), version=7, label="seven")
    for number in range(3):  # Nobody else could give it.
        fleet.kill(number)
    newcomer = fleet.add()
    assert newcomer.values() == {2.0}
    assert (newcomer.receiver.version, newcomer.receiver.label) == (7, "seven")
    assert 3 in fleet.weights.serving
    publisher.publish(weights(3.0))
    assert newcomer.values() == {3.0}


def test_a_newcomer_gets_it_from_a_peer_when_the_arena_is_gone_or_written_anew(
    fleet: Fleet, publisher: WeightPublisher
) -> None:
    with WeightPublisher(fleet) as other:
        other.publish(weights(1.0))
    assert fleet.add().values() == {1.0}
    report = publisher.publish(weights(2.0))
    packed = publisher._endpoint._packed
    assert packed is not None
    packed.buffer.fill_(77)  # The trainer packs the next version already.
    assert fleet.add().values() == {2.0}
    assert fleet.weights.served.fingerprint == report.fingerprint == publisher.fingerprint()
    assert fleet.versions == [2] * 5


def test_a_newcomer_gets_it_although_only_parts_were_published(
    fleet: Fleet, publisher: WeightPublisher
) -> None:
    tensors = weights(1.0)
    half = dict(list(tensors.items())[:4])
    for engine in fleet.engines:
        engine.host.look_away()
    publisher.publish(half, strict=False)
    newcomer = fleet.add(looks=False)
    assert newcomer.values() == {0.0, 1.0} == fleet.engines[0].values()
    publisher.publish(dict(list(tensors.items())[4:]), strict=False)
    assert fleet.values == [{1.0}] * 4
    for number in range(4):
        fleet.kill(number)
    assert fleet.add().values() == {1.0}  # By now the arena holds all of it.


def test_a_parameter_is_read_from_a_peer_in_pieces(
    fleet: Fleet, publisher: WeightPublisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(3)
    tensors = {
        name: torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
        for name, tensor in weights(0.0).items()
    }
    for engine in fleet.engines:
        engine.host.look_away()
    with WeightPublisher(fleet) as other:
        report = other.publish(tensors)
    monkeypatch.setattr("rollout.pool.catch_up.CHUNK_BYTES", 100)
    engine = fleet._make_engine(serve=True)
    engine.host.look_away()
    fleet.engines.append(engine)
    fleet.members.append(
        ReplicaMember(
            name="replica 3",
            number=3,
            channel=engine.weight_channel(),
            ask=lambda body, timeout_s: None,
        )
    )
    fleet.weights.add(fleet.members[-1]).result(60)
    assert publisher.fingerprint() == report.fingerprint
    assert fleet.weights.serving == {0, 1, 2, 3}


def test_with_neither_arena_nor_peer_a_newcomer_does_not_serve_until_a_complete_update(
    fleet: Fleet, publisher: WeightPublisher
) -> None:
    with WeightPublisher(fleet) as other:
        other.publish(weights(1.0))
    for number in range(3):
        fleet.kill(number)
    with pytest.raises(TornWeightsError, match="publish a complete update"):
        fleet.add()
    assert fleet.weights.serving == set()
    assert "no replica holds version 1" in str(publisher.engine_info().torn)
    with pytest.raises(ManifestMismatch):
        publisher.publish(dict(list(weights(2.0).items())[:3]), strict=False)
    assert fleet.weights.serving == set() and fleet.engines[3].values() == {0.0}
    publisher.publish(weights(2.0))
    assert fleet.weights.serving == {3} and fleet.engines[3].values() == {2.0}
    assert fleet.engines[3].receiver.version == 2 and publisher.engine_info().torn is None


def test_a_newcomer_that_loads_other_weights_than_the_others_does_not_serve(
    make_engine: Callable[..., ToyEngine], fleet: Fleet
) -> None:
    engine = make_engine(serve=True)
    engine.host.look_away()
    for parameter in engine.weight_map.parameters.values():
        parameter.fill_(6.0)
    member = ReplicaMember(
        name="replica 9",
        number=9,
        channel=engine.weight_channel(),
        ask=lambda body, timeout_s: None,
    )
    fleet.members.append(member)
    with pytest.raises(FingerprintMismatch, match="replica 9"):
        fleet.weights.add(member).result(60)
    assert fleet.weights.serving == {0, 1, 2} and 9 in fleet.weights.behind


def test_an_update_of_parts_leaves_out_who_is_behind(
    fleet: Fleet, publisher: WeightPublisher
) -> None:
    for engine in fleet.engines:
        engine.host.look_away()
    publisher.publish(weights(1.0))
    fleet.engines[0].host.fail_in = "between_steps"
    publisher.publish(weights(2.0))
    publisher.publish([("norm.weight", torch.full((7,), 3.0))], strict=False)
    assert fleet.versions == [1, 3, 3]  # No mixture of versions 1 and 3.
    assert fleet.engines[0].values() == {1.0} and fleet.weights.serving == {1, 2}
    fleet.weights.bring_up(0).result(60)
    assert fleet.values == [{2.0, 3.0}] * 3 and fleet.weights.serving == {0, 1, 2}


def test_a_replica_whose_memory_differs_after_an_update_of_parts_does_not_serve(
    fleet: Fleet, publisher: WeightPublisher
) -> None:
    for engine in fleet.engines:
        engine.host.look_away()
    next(iter(fleet.engines[2].weight_map.parameters.values())).view(-1)[0] = 5.0
    publisher.publish([("norm.weight", torch.full((7,), 3.0))], strict=False)
    assert fleet.versions == [1, 1, 1] and fleet.weights.serving == {0, 1}
    publisher.publish(weights(2.0))
    assert fleet.values == [{2.0}] * 3 and fleet.weights.serving == {0, 1, 2}


# ---- rules -----------------------------------------------------------------------------------------------------------


def test_versions_only_grow_and_a_base_must_be_served(
    fleet: Fleet, publisher: WeightPublisher
) -> None:
    publisher.publish(weights(1.0), version=5)
    with pytest.raises(StaleVersionError, match="got 5, expected more than 5"):
        publisher.publish(weights(2.0), version=5)
    with pytest.raises(StaleVersionError, match="base_version 4"):
        publisher.publish(weights(2.0), base_version=4)
    publisher.publish(weights(2.0), base_version=5)
    assert fleet.versions == [6] * 3


def test_replicas_that_hold_different_weights_are_found_out(
    fleet: Fleet, publisher: WeightPublisher
) -> None:
    publisher.publish(weights(1.0))
    with fleet.lone(2) as lone:
        lone.publish(weights(9.0))
    with pytest.raises(WeightUpdateError, match="different weights"):
        publisher.fingerprint()


def test_a_publisher_sees_one_engine_whatever_replicas_come_and_go(
    fleet: Fleet, publisher: WeightPublisher
) -> None:
    publisher.publish(weights(1.0))
    before = publisher.engine_info()
    fleet.kill(0)
    fleet.weights.remove(0).result(60)
    fleet.add()
    after = publisher.engine_info()
    assert after.engine_id == before.engine_id and after.version == before.version == 1
    assert (before.tp_size, after.tp_size) == (3, 3)
    arena = publisher._endpoint._packed
    publisher.publish(weights(2.0))
    assert publisher._endpoint._packed is arena and fleet.values[1:] == [{2.0}] * 3


def test_lost_weights_are_whole_again_after_a_complete_update(
    fleet: Fleet, publisher: WeightPublisher
) -> None:
    publisher.publish(weights(1.0))
    for engine in fleet.engines:
        engine.receiver.lose_weights("released")
    fleet.weights.look().result(60)
    assert "released" in str(publisher.engine_info().torn)
    publisher.publish(weights(2.0))
    assert publisher.engine_info().torn is None and fleet.weights.lost is None


def test_one_of_several_that_has_lost_its_weights_does_not_serve(
    fleet: Fleet, publisher: WeightPublisher
) -> None:
    """Its memory was released after a commit, that of the others before it."""
    publisher.publish(weights(2.0))
    fleet.engines[1].receiver.lose_weights("their memory was released")
    fleet.weights.look().result(60)
    assert fleet.weights.serving == {0, 2} and fleet.weights.lost is None
    assert isinstance(fleet.weights.behind[1], TornWeightsError)
    assert publisher.fingerprint() == publisher.publish(weights(2.0)).fingerprint
    assert fleet.weights.serving == {0, 1, 2}


def test_a_bucket_that_makes_no_sense_is_refused_as_by_one_engine(fleet: Fleet) -> None:
    trainer = fleet.weight_channel()
    with WeightPublisher(fleet) as publisher:
        publisher.begin()
        update = publisher._update
        assert update is not None
        for indices, values in (([1 << 20], [0]), ([0, 1], [0])):
            bucket = Bucket(
                session_id=update.session_id,
                epoch=update.epoch,
                indices=np.array(indices, dtype="<u4").tobytes(),
                fingerprints=np.array(values, dtype="<u8").tobytes(),
            )
            with pytest.raises((ProtocolError, SessionError)):
                trainer.call(bucket, 60.0)
    assert fleet.versions == [0] * 3
