"""kill -9 of a rank, or of the process that owns the engine: all of it goes, promptly, and nobody waits for it."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from engine_deaths import all_gone, fails, owner_dies, rank_dies
from engine_faults import (
    Breakpoints,
    FaultyEngine,
    Nursery,
    num_arenas,
    num_descriptors,
    shm_names,
    wait_for,
)
from fault_matrix import OWNER_DEATHS, RANK_DEATHS, Case, record

from rollout import Engine
from weight_sync.errors import EngineDiedError
from weight_sync.process_groups.rendezvous import StoreServer


@pytest.mark.parametrize("case", RANK_DEATHS, ids=str)
def test_a_killed_rank_ends_the_engine_and_every_call(
    case: Case,
    make_engine_with_faults: Callable[..., FaultyEngine],
    nursery: Nursery,
    tmp_path: Path,
    socket_folders: Callable[[], set[str]],
) -> None:
    StoreServer(timeout_s=1.0).close()  # torch opens a pipe with the first one, for good
    gc.collect()
    descriptors, names, sockets = num_descriptors(os.getpid()), shm_names(), socket_folders()
    engine = make_engine_with_faults(tp_size=case.tp_size)
    assert socket_folders() > sockets
    outcome = rank_dies(case, engine, nursery, tmp_path)
    engine.close()
    assert shm_names() <= names
    assert socket_folders() <= sockets
    del engine
    gc.collect()
    wait_for("descriptors given back", lambda: num_descriptors(os.getpid()) <= descriptors)
    record(case, outcome)


@pytest.mark.parametrize("case", OWNER_DEATHS, ids=str)
def test_a_killed_owner_takes_its_engine_along(
    case: Case,
    nursery: Nursery,
    folder: Path,
    tmp_path: Path,
    socket_folders: Callable[[], set[str]],
) -> None:
    points = Breakpoints(tmp_path / "points")
    before = socket_folders()
    owner = nursery.owner(folder, points.folder, tp_size=case.tp_size)
    assert owner.says() and socket_folders() > before
    outcome = owner_dies(case, owner, points, case.tp_size - 1, nursery, folder)
    wait_for("sockets removed", lambda: socket_folders() <= before)
    record(case, outcome)


def test_an_engine_that_shuts_down_leaves_no_socket_and_no_descriptor(
    folder: Path, socket_folders: Callable[[], set[str]]
) -> None:
    StoreServer(timeout_s=1.0).close()
    gc.collect()
    before, sockets = num_descriptors(os.getpid()), socket_folders()
    with Engine(
        folder, executor="local", tp_size=2, kv_cache_bytes=1 << 20, num_threads=1
    ) as engine:
        assert engine.address
    gc.collect()
    assert socket_folders() <= sockets
    assert num_descriptors(os.getpid()) <= before
    assert num_arenas(os.getpid()) == 0


def test_a_rank_that_is_told_to_terminate_leaves_no_socket(
    folder: Path,
    make_engine_with_faults: Callable[..., FaultyEngine],
    socket_folders: Callable[[], set[str]],
) -> None:
    """As Ray tells it when the actor that has started it died, while its own lifeline ends."""
    before = socket_folders()
    engine = make_engine_with_faults(tp_size=2)
    assert socket_folders() > before
    os.kill(engine.pids[1], signal.SIGTERM)
    all_gone(engine.pids[1:])
    assert socket_folders() <= before
    wait_for("the engine's end", lambda: fails(engine.engine.status))
    with pytest.raises(EngineDiedError, match="exit code 143"):
        engine.engine.status()
    engine.close()
