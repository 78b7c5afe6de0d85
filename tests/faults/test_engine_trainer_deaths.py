"""kill -9 of a trainer while an engine that generates is in a given phase of its update."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engine_faults import (
    PROMPT_SETS,
    PROMPTLY_S,
    FaultyEngine,
    Nursery,
    Stream,
    check_descriptors,
    check_spans,
    num_descriptors,
    shm_names,
    wait_for,
)
from fault_matrix import TRAINER_DEATHS, Case, Outcome, record
from versions import Reference, version_weights

from weight_sync import WeightPublisher

OLD, NEW, NEXT = 1, 2, 3


def publish(engine: FaultyEngine, number: int, transport: Any = "auto") -> None:
    with WeightPublisher(engine.engine.address, transport=transport, timeout_s=20.0) as publisher:
        publisher.publish(version_weights(engine.folder, number), label=f"v{number}")


@pytest.mark.parametrize("case", TRAINER_DEATHS, ids=str)
def test_a_killed_trainer_leaves_one_whole_version_on_all_ranks(
    case: Case,
    engine_of: Callable[..., FaultyEngine],
    nursery: Nursery,
    folder: Path,
    reference: Reference,
) -> None:
    engine = engine_of(tp_size=case.tp_size)
    publish(engine, OLD, case.transport)
    engine.holds_no_arena()
    descriptors, names = [num_descriptors(pid) for pid in engine.pids], shm_names()
    stream = Stream(engine.engine)
    rank = case.tp_size - 1
    commits = case.phase not in ("begin", "stage")
    # Over a group the ranks themselves wait, for bytes that never come.
    halfway = case.transport == "process_group" and case.phase == "stage"
    if case.phase != "idle" and not halfway:
        engine.points.stop(case.phase, rank)
    trainer = nursery.trainer(
        engine.engine.address,
        folder,
        NEW,
        commits=commits,
        transport=case.transport,
        halfway=halfway,
        label=f"v{NEW}",
    )
    if case.phase == "idle":
        assert "version" in trainer.says()
    elif halfway:
        assert "halfway" in trainer.says()
    else:
        engine.points.reached(case.phase, rank)
    time.sleep(0.4)  # longer than the interval at which ranks look after their trainers
    trainer.kill()
    if not halfway:
        time.sleep(0.4)
    start = time.monotonic()
    engine.points.go_on(case.phase, rank)
    engine.holds_no_arena()
    # An update that was all there is committed, whoever sent it; of any other nothing is left.
    serves = NEW if commits else OLD
    wait_for("its version", lambda: engine.engine.get_weight_version() == f"v{serves}", 10)
    engine.serves(serves)
    publish(engine, NEXT, case.transport)
    seconds = time.monotonic() - start
    assert seconds < PROMPTLY_S
    engine.serves(NEXT)
    for result in stream.stop():
        check_spans(PROMPT_SETS[0], result, reference)
    engine.holds_no_arena()
    check_descriptors(engine.pids, descriptors)
    assert shm_names() <= names
    which = "the old version" if serves == OLD else "the new version"
    record(case, Outcome(result=f"{which} serves, whole; the next update commits", seconds=seconds))


@pytest.mark.parametrize("tp_size", [1, 2])
def test_ten_syncs_and_their_trainers_leave_nothing_behind(
    engine_of: Callable[..., FaultyEngine], nursery: Nursery, folder: Path, tp_size: int
) -> None:
    engine = engine_of(tp_size=tp_size)
    publish(engine, OLD)
    engine.holds_no_arena()
    wait_for("quiet", lambda: engine.engine.status().num_running == 0)
    descriptors = [num_descriptors(pid) for pid in engine.pids]
    with WeightPublisher(engine.engine.address) as publisher:
        for number in range(1, 11):
            publisher.publish(version_weights(folder, number))
    for number in (11, 12):
        trainer = nursery.trainer(engine.engine.address, folder, number)
        assert "version" in trainer.says()
        trainer.kill()
    engine.holds_no_arena()
    engine.serves(12)
    check_descriptors(engine.pids, descriptors)
