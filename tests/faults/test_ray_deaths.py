"""kill -9 of ranks, trainers, drivers, actors and replicas on a Ray cluster, in every phase of an update."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from engine_deaths import owner_dies, rank_dies, trainer_dies
from engine_faults import (
    Breakpoints,
    FaultyEngine,
    Nursery,
    check_descriptors,
    num_descriptors,
    wait_for,
)
from fault_matrix import (
    ACTOR_DEATHS,
    ACTOR_TRAINER_DEATHS,
    RAY_OWNER_DEATHS,
    RAY_POOL_TRAINER_DEATHS,
    RAY_RANK_DEATHS,
    RAY_REPLICA_DEATHS,
    RAY_TRAINER_DEATHS,
    Case,
    record,
)
from forks import Zygote
from pool_deaths import FaultyPool, pool_trainer_dies, replica_dies
from ray_cluster import ray_cluster
from ray_deaths import (
    FaultyActor,
    actor_dies,
    no_room_is_taken,
    open_what_stays_open,
    sockets_in,
)
from shm import shm_names
from versions import Reference

NUM_CPUS = 4


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """One node, connected."""
    with ray_cluster(num_nodes=1, cpus_per_node=NUM_CPUS, forks=True) as cluster:
        open_what_stays_open()
        yield cluster


@pytest.fixture(scope="module")
def make(
    cluster: Any,
    folder: Path,
    reference: Reference,
    zygote: Zygote,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Any]:
    """`make(FaultyEngine, ...)`: something on the cluster that the caller closes."""

    def start(cls: Any, **options: Any) -> Any:
        points = tmp_path_factory.mktemp("points") / "points"
        return cls(folder, points, reference, zygote, **options)

    return start


@pytest.fixture(scope="module")
def shared(make: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """As `make`, for what tests share as long as they ask for the same."""
    current: list[tuple[Any, Any]] = []

    def find(cls: Any, **options: Any) -> Any:
        if current and current[0][0] != (cls, options):
            current.pop()[1].close()
        if not current:
            current.append(((cls, options), make(cls, **options)))
        current[0][1].points.clear()
        return current[0][1]

    yield find
    for _, made in current:
        made.close()


@pytest.mark.parametrize("case", RAY_TRAINER_DEATHS, ids=str)
def test_a_killed_trainer_leaves_one_whole_version_on_all_ranks(
    case: Case, shared: Callable[..., Any], nursery: Nursery, reference: Reference
) -> None:
    engine = shared(FaultyEngine, executor="ray", tp_size=case.tp_size)
    record(case, trainer_dies(case, engine, nursery, reference))


@pytest.mark.parametrize("case", ACTOR_TRAINER_DEATHS, ids=str)
def test_a_killed_trainer_leaves_one_whole_version_in_an_actor(
    case: Case, shared: Callable[..., Any], nursery: Nursery, reference: Reference
) -> None:
    record(case, trainer_dies(case, shared(FaultyActor), nursery, reference))


@pytest.mark.parametrize("case", RAY_REPLICA_DEATHS, ids=str)
def test_a_killed_replica_is_replaced_by_one_that_holds_the_served_version(
    case: Case, shared: Callable[..., Any], nursery: Nursery, reference: Reference
) -> None:
    record(case, replica_dies(case, shared(FaultyPool, executor="ray"), nursery, reference))


@pytest.mark.parametrize("case", RAY_POOL_TRAINER_DEATHS, ids=str)
def test_a_killed_trainer_leaves_one_whole_version_on_all_replicas(
    case: Case, shared: Callable[..., Any], nursery: Nursery, reference: Reference
) -> None:
    pool = shared(FaultyPool, executor="ray")
    record(case, pool_trainer_dies(case, pool, nursery, reference))


@pytest.fixture
def nothing_stays(cluster: Any, shared: Callable[..., Any]) -> Iterator[None]:
    """After the test the cluster has all of its room again; there is no socket, shared memory or open file more."""
    shared(NoEngine)  # Ends what the tests before have shared.
    no_room_is_taken(NUM_CPUS)
    gc.collect()
    sockets, names = sockets_in(cluster.temporary), shm_names()
    descriptors = num_descriptors(os.getpid())
    yield
    gc.collect()
    no_room_is_taken(NUM_CPUS)
    wait_for("sockets removed", lambda: sockets_in(cluster.temporary) <= sockets)
    assert shm_names() <= names
    check_descriptors([os.getpid()], [descriptors])


class NoEngine:
    """What `shared` has when nobody shares anything."""

    def __init__(self, *_: Any) -> None:
        self.points = self

    def clear(self) -> None:
        """Nothing is stopped."""

    def close(self) -> None:
        """Nothing is there."""


@pytest.mark.parametrize("case", RAY_RANK_DEATHS, ids=str)
def test_a_killed_rank_ends_the_engine_and_every_call(
    case: Case, make: Callable[..., Any], nursery: Nursery, tmp_path: Path, nothing_stays: None
) -> None:
    engine = make(FaultyEngine, executor="ray", tp_size=case.tp_size)
    with closing(engine):
        outcome = rank_dies(case, engine, nursery, tmp_path)
    record(case, outcome)


@pytest.mark.parametrize("case", ACTOR_DEATHS, ids=str)
def test_a_killed_actor_ends_every_call(
    case: Case, make: Callable[..., Any], nursery: Nursery, nothing_stays: None
) -> None:
    actor = make(FaultyActor, tp_size=case.tp_size)
    with closing(actor):
        outcome = actor_dies(case, actor, nursery)
    record(case, outcome)


@pytest.mark.parametrize("case", RAY_OWNER_DEATHS, ids=str)
def test_a_killed_driver_takes_its_engine_along(
    case: Case,
    cluster: Any,
    nursery: Nursery,
    folder: Path,
    tmp_path: Path,
    nothing_stays: None,
) -> None:
    points, address = Breakpoints(tmp_path / "points"), cluster.address
    options = {"executor": "ray", "tp_size": case.tp_size, "ray": address}
    owner = nursery.owner(folder, points.folder, **options)
    record(case, owner_dies(case, owner, points, case.tp_size - 1, nursery, folder))
