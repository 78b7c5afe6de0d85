"""kill -9 of a replica of a pool, of its trainer, and of its owner, in every phase of an update for all replicas."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from engine_deaths import owner_dies
from engine_faults import Breakpoints, Nursery, wait_for
from fault_matrix import POOL_OWNER_DEATHS, POOL_TRAINER_DEATHS, REPLICA_DEATHS, Case, record
from forks import Zygote
from pool_deaths import FaultyPool, pool_trainer_dies, replica_dies
from versions import Reference


@pytest.fixture(scope="module")
def pool(
    folder: Path, reference: Reference, zygote: Zygote, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[FaultyPool]:
    points = tmp_path_factory.mktemp("points") / "points"
    pool = FaultyPool(folder, points, reference, zygote)
    yield pool
    pool.close()


@pytest.mark.parametrize("case", REPLICA_DEATHS, ids=str)
def test_a_killed_replica_is_replaced_by_one_that_holds_the_served_version(
    case: Case, pool: FaultyPool, nursery: Nursery, reference: Reference
) -> None:
    record(case, replica_dies(case, pool, nursery, reference))


@pytest.mark.parametrize("case", POOL_TRAINER_DEATHS, ids=str)
def test_a_killed_trainer_leaves_one_whole_version_on_all_replicas(
    case: Case, pool: FaultyPool, nursery: Nursery, reference: Reference
) -> None:
    record(case, pool_trainer_dies(case, pool, nursery, reference))


@pytest.mark.parametrize("case", POOL_OWNER_DEATHS, ids=str)
def test_a_killed_owner_takes_its_pool_along(
    case: Case,
    nursery: Nursery,
    folder: Path,
    tmp_path: Path,
    socket_folders: Callable[[], set[str]],
) -> None:
    points = Breakpoints(tmp_path / "points")
    before = socket_folders()
    owner = nursery.owner(folder, points.folder, num_replicas=2)
    whom = f"pid{owner.says()['pids'][-1]}"
    assert socket_folders() > before
    outcome = owner_dies(case, owner, points, whom, nursery, folder)
    wait_for("sockets removed", lambda: socket_folders() <= before)
    record(case, outcome)
