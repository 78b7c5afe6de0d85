"""kill -9 of a trainer while an engine that generates is in a given phase of its update."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from engine_deaths import OLD, publish, trainer_dies
from engine_faults import FaultyEngine, Nursery, check_descriptors, num_descriptors, wait_for
from fault_matrix import TRAINER_DEATHS, Case, record
from versions import Reference, version_weights

from weight_sync import WeightPublisher


@pytest.mark.parametrize("case", TRAINER_DEATHS, ids=str)
def test_a_killed_trainer_leaves_one_whole_version_on_all_ranks(
    case: Case,
    engine_of: Callable[..., FaultyEngine],
    nursery: Nursery,
    reference: Reference,
) -> None:
    engine = engine_of(tp_size=case.tp_size)
    record(case, trainer_dies(case, engine, nursery, reference))


@pytest.mark.parametrize("tp_size", [1, 2])
def test_ten_syncs_and_their_trainers_leave_nothing_behind(
    engine_of: Callable[..., FaultyEngine], nursery: Nursery, folder: Path, tp_size: int
) -> None:
    engine = engine_of(tp_size=tp_size)
    publish(engine.address, folder, OLD)
    engine.holds_no_arena()
    wait_for("quiet", lambda: engine.engine.status().num_running == 0)
    descriptors = [num_descriptors(pid) for pid in engine.pids]
    with WeightPublisher(engine.address) as publisher:
        for number in range(1, 11):
            publisher.publish(version_weights(folder, number))
    for number in (11, 12):
        trainer = nursery.trainer(engine.address, folder, number)
        assert "version" in trainer.says()
        trainer.kill()
    engine.holds_no_arena()
    engine.serves(12)
    check_descriptors(engine.pids, descriptors)
