"""Who dies or lies, in which phase, over which transport, of which engine: every case that must be tested.

The tests take their parameters from here, and `docs/faults.md` has an entry for each: none can be dropped in silence.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROWS_VARIABLE = "FAULT_ROWS"
"""Folder in which a test run leaves a file for each case that it passed."""
PROMPTLY_S = 30.0
"""Nobody waits longer: far below any deadline in use, far above what a loaded machine needs."""
UPDATE = ("begin", "stage", "vote", "commit")
PHASES = ("idle", "generating", *UPDATE)
SHM, GROUP, DISK = "shared_memory", "process_group", "disk"
ENGINES: Mapping[str, tuple[str, int]] = {
    "inline": ("inline", 1),
    "local, 1 rank": ("local", 1),
    "local, 2 ranks": ("local", 2),
    "Ray, 1 rank": ("ray", 1),
    "Ray, 2 ranks": ("ray", 2),
    "actor, 1 rank": ("actor", 1),
    "actor, 2 ranks": ("actor", 2),
    "pool of 2": ("pool", 1),
    "Ray pool of 2": ("ray pool", 1),
}
"""What is under test: how it is called -> where its loop runs, ranks of an engine."""
LOCAL = ("local, 1 rank", "local, 2 ranks")
POOL = ("pool of 2",)
RAY = ("Ray, 1 rank", "Ray, 2 ranks")
ACTOR = ("actor, 1 rank", "actor, 2 ranks")
RAY_POOL = ("Ray pool of 2",)

RESULTS = {
    "old": "the old version serves, whole, on all ranks; the next update commits",
    "new": "the new version serves, whole, on all ranks; the next update commits",
    "ends": "the engine ends: every call gets `EngineDiedError`, no process, socket or descriptor is left",
    "actor ends": "the actor ends: its calls get Ray's `ActorDiedError`, clients of its address `EngineDiedError`; no "
    "process and no socket is left, its room is free",
    "ends too": "the engine ends with it: other clients get `EngineDiedError`, no process and no socket is left",
    "replaced": "the pool goes on at the version that it had; the replica is replaced, by one that holds this version "
    "before it serves; no request is lost, those that ran there run again; the next update commits on all",
    "replaced, new": "the others commit; the replica is replaced, by one that holds the new version before it serves; "
    "no request is lost, those that ran there run again; the next update commits on all",
    "replaced, old": "the update is refused everywhere and its publisher gets an error; the replica is replaced, by "
    "one that holds the old version; no request is lost, those that ran there run again; the next update commits on "
    "all",
}
"""Short names, used in the tables, of what happens when somebody dies."""


SECTIONS: Sequence[tuple[str, str, Sequence[str]]] = (
    (
        "An engine in child processes",
        "One process for each rank. The owner is the process that made the engine. Over disk the owner reads a "
        "folder and is the trainer itself, so only ranks are killed. Idle and generating involve no transport: "
        "they are run once.",
        ("local",),
    ),
    (
        "A pool of two replicas",
        "Two engines of one rank in child processes behind one surface, which are told of an update at the same "
        "time. The replica that is stopped is the one that dies, or for somebody else's death the last one. A "
        "replica that is killed before the bytes have come breaks a process group, so the update is refused; in "
        "shared memory the others need nobody.",
        ("pool",),
    ),
    (
        "An engine on Ray",
        "One actor for each rank; the owner is the driver of a job on the cluster. Also checked: Ray has all of "
        "its room again. With one rank a killed actor is the whole engine, so fewer phases are run for it than "
        "with two. A driver's death reaches the ranks in one way in all phases, through Ray; those are run in "
        "which the ranks hold most.",
        ("ray",),
    ),
    (
        "A `RolloutActor`",
        "One engine inside an actor: with one rank in the actor's own process, with two in child processes of it. "
        "What the engine does in the phases of an update is the same code as everywhere; those are run in which "
        "it holds most. The child processes of an actor are an engine in child processes, whose owner is the "
        "actor: one case shows that it ends like that. "
        "Ray opens connections of its own in an actor, so a few descriptors more are allowed, for all cases together.",
        ("actor",),
    ),
    (
        "A pool of two replicas on Ray",
        "The same as above, with engines of one actor each. Its owner is a driver, whose death is above, too.",
        ("ray pool",),
    ),
)
"""Tables of deaths: title, introduction, and the executors whose cases it has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One entry of the matrix."""

    who: str
    """Whoever dies or lies, and how."""
    phase: str
    """What the engine was doing at that moment."""
    transport: str
    """How the weights come."""
    engine: str
    """What is under test, a key of `ENGINES`."""

    @property
    def tp_size(self) -> int:
        """Ranks of the engine."""
        return ENGINES[self.engine][1]

    @property
    def executor(self) -> str:
        """Where its loop runs."""
        return ENGINES[self.engine][0]

    def __str__(self) -> str:
        return f"{self.who}, {self.phase}, {self.transport}, {self.engine}".replace(" ", "-")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a test saw."""

    result: str
    """A key of `RESULTS`, or words."""
    seconds: float
    """From the fault until nobody waited any more, or the next version served."""


def killed(
    who: str, phases: Sequence[str], engines: Sequence[str], transport: str = SHM
) -> tuple[Case, ...]:
    """`who` gets a kill -9."""
    return tuple(
        Case(who=f"{who} killed", phase=phase, transport=transport, engine=engine)
        for engine in engines
        for phase in phases
    )


TRAINER_DEATHS = (
    *killed("trainer", ("idle", *UPDATE), LOCAL),
    *killed("trainer", UPDATE, LOCAL, GROUP),
)
RANK_DEATHS = (
    *killed("rank 0", PHASES, LOCAL),
    *killed("rank 0", UPDATE, LOCAL, GROUP),
    *killed("rank 0", ("stage", "commit"), LOCAL, DISK),
    *killed("rank 1", PHASES, LOCAL[1:]),
    *killed("rank 1", UPDATE, LOCAL[1:], GROUP),
    *killed("rank 1", ("stage", "commit"), LOCAL[1:], DISK),
)
OWNER_DEATHS = (
    *killed("owner", ("generating", *UPDATE), LOCAL),
    *killed("owner", UPDATE, LOCAL, GROUP),
)
REPLICA_DEATHS = (
    *killed("replica", PHASES, POOL),
    *killed("replica", UPDATE, POOL, GROUP),
)
POOL_TRAINER_DEATHS = (
    *killed("trainer", ("idle", *UPDATE), POOL),
    *killed("trainer", UPDATE, POOL, GROUP),
)
POOL_OWNER_DEATHS = killed("owner", ("generating", *UPDATE), POOL)
RAY_TRAINER_DEATHS = (
    *killed("trainer", ("idle", *UPDATE), RAY),
    *killed("trainer", UPDATE, RAY, GROUP),
)
RAY_RANK_DEATHS = (
    *killed("rank 0", ("generating", "stage", "commit"), RAY[:1]),
    *killed("rank 0", ("stage", "commit"), RAY[:1], GROUP),
    *killed("rank 0", PHASES, RAY[1:]),
    *killed("rank 0", UPDATE, RAY[1:], GROUP),
    *killed("rank 1", PHASES, RAY[1:]),
    *killed("rank 1", UPDATE, RAY[1:], GROUP),
)
RAY_OWNER_DEATHS = (
    *killed("owner", ("generating",), RAY[:1]),
    *killed("owner", ("generating", "stage", "commit"), RAY[1:]),
    *killed("owner", ("stage", "commit"), RAY[1:], GROUP),
)
ACTOR_TRAINER_DEATHS = (
    *killed("trainer", ("idle", *UPDATE), ACTOR[:1]),
    *killed("trainer", UPDATE, ACTOR[:1], GROUP),
)
ACTOR_DEATHS = (
    *killed("actor", ("generating", "stage", "commit"), ACTOR[:1]),
    *killed("actor", ("stage", "commit"), ACTOR[:1], GROUP),
    *killed("actor", ("generating",), ACTOR[1:]),
    *(
        Case(who="actor ended by ray.kill", phase=phase, transport=SHM, engine=ACTOR[0])
        for phase in ("generating", "stage", "commit")
    ),
)
RAY_REPLICA_DEATHS = (
    *killed("replica", PHASES, RAY_POOL),
    *killed("replica", UPDATE, RAY_POOL, GROUP),
)
RAY_POOL_TRAINER_DEATHS = (
    *killed("trainer", ("idle", *UPDATE), RAY_POOL),
    *killed("trainer", UPDATE, RAY_POOL, GROUP),
)
LIES = tuple(
    Case(who=who, phase=phase, transport=transport, engine=engine)
    for engine in LOCAL
    for who, phase, transport in (
        ("trainer declares a wrong fingerprint", "stage", SHM),
        ("trainer leaves tensors out", "vote", SHM),
        ("trainer changes the arena after the vote", "commit", SHM),
        ("trainer stays silent past its lease", "stage", SHM),
        ("trainer sets a deadline that passes", "commit", SHM),
        ("last rank raises", "begin", SHM),
        ("last rank raises", "stage", SHM),
        ("last rank raises", "vote", SHM),
        ("last rank raises half-way", "commit", SHM),
        ("last rank writes a wrong byte", "commit", SHM),
        ("folder is torn", "stage", DISK),
        ("folder has a changed byte", "stage", DISK),
    )
)
LOCAL_LIES = tuple(
    Case(who=who, phase=phase, transport="local", engine="inline")
    for who, phase in (
        ("trainer declares a wrong fingerprint", "stage"),
        ("trainer changes the arena after the vote", "commit"),
    )
)
KEPT_COPY = tuple(
    Case(who=f"{who}, a copy is kept", phase="commit", transport=SHM, engine=LOCAL[1])
    for who in (
        "trainer changes the arena after the vote",
        "last rank raises half-way",
        "last rank writes a wrong byte",
    )
)
DEATHS = (
    *TRAINER_DEATHS,
    *RANK_DEATHS,
    *OWNER_DEATHS,
    *POOL_TRAINER_DEATHS,
    *REPLICA_DEATHS,
    *POOL_OWNER_DEATHS,
    *RAY_TRAINER_DEATHS,
    *RAY_RANK_DEATHS,
    *RAY_OWNER_DEATHS,
    *ACTOR_TRAINER_DEATHS,
    *ACTOR_DEATHS,
    *RAY_POOL_TRAINER_DEATHS,
    *RAY_REPLICA_DEATHS,
)
ALL_LIES = (*LIES, *LOCAL_LIES, *KEPT_COPY)
CASES = (*DEATHS, *ALL_LIES)


def record(case: Case, outcome: Outcome) -> None:
    """Note that `case` was passed, where a run collects rows."""
    assert case in CASES and (case not in DEATHS or outcome.result in RESULTS)
    folder = os.environ.get(ROWS_VARIABLE)
    if folder:
        row = {**asdict(case), **asdict(outcome)}
        (Path(folder) / f"{CASES.index(case):03}.json").write_text(json.dumps(row))
