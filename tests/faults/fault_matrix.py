"""Who dies or lies, in which phase, over which transport, with how many ranks: every case that must be tested.

The tests take their parameters from here, and `docs/faults.md` has a row for each, so none can be dropped in silence.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROWS_VARIABLE = "FAULT_ROWS"
"""Folder in which a test run leaves a file for each case that it passed."""
PHASES = ("begin", "stage", "vote", "commit")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One row of the matrix."""

    who: str
    """Whoever dies or lies, and how."""
    phase: str
    """What the engine was doing at that moment."""
    transport: str
    """How the weights come."""
    tp_size: int
    """Ranks of the engine."""

    def __str__(self) -> str:
        return f"{self.who}, {self.phase}, {self.transport}, {self.tp_size}".replace(" ", "-")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a test saw."""

    result: str
    """In words."""
    seconds: float
    """From the fault until nobody waited any more, or the next version served."""


def killed(
    who: str, phases: Sequence[str], tp_sizes: Sequence[int], transport: str = "shared_memory"
) -> tuple[Case, ...]:
    """`who` gets a kill -9."""
    return tuple(
        Case(who=f"{who} killed", phase=phase, transport=transport, tp_size=tp_size)
        for tp_size in tp_sizes
        for phase in phases
    )


TRAINER_DEATHS = (
    *killed("trainer", ("idle", *PHASES), (1, 2)),
    *killed("trainer", PHASES, (1, 2), "process_group"),
)
RANK_DEATHS = (
    *killed("rank 0", ("generating", "stage", "commit"), (1,)),
    *killed("rank 0", ("idle", "generating", *PHASES), (2,)),
    *killed("rank 1", ("idle", "generating", *PHASES), (2,)),
    *killed("rank 0", ("stage",), (2,), "process_group"),
    *killed("rank 1", ("stage",), (2,), "process_group"),
)
OWNER_DEATHS = (
    *killed("owner", ("generating",), (1,)),
    *killed("owner", ("generating", "commit"), (2,)),
)
LIES = tuple(
    Case(who=who, phase=phase, transport=transport, tp_size=tp_size)
    for tp_size in (1, 2)
    for who, phase, transport in (
        ("trainer declares a wrong fingerprint", "stage", "shared_memory"),
        ("trainer leaves tensors out", "vote", "shared_memory"),
        ("trainer changes the arena after the vote", "commit", "shared_memory"),
        ("trainer stays silent past its lease", "stage", "shared_memory"),
        ("trainer sets a deadline that passes", "commit", "shared_memory"),
        ("last rank raises", "begin", "shared_memory"),
        ("last rank raises", "stage", "shared_memory"),
        ("last rank raises", "vote", "shared_memory"),
        ("last rank raises half-way", "commit", "shared_memory"),
        ("last rank writes a wrong byte", "commit", "shared_memory"),
        ("folder is torn", "stage", "disk"),
        ("folder has a changed byte", "stage", "disk"),
    )
)
LOCAL_LIES = tuple(
    Case(who=who, phase=phase, transport="local", tp_size=1)
    for who, phase in (
        ("trainer declares a wrong fingerprint", "stage"),
        ("trainer changes the arena after the vote", "commit"),
    )
)
KEPT_COPY = tuple(
    Case(who=f"{who}, a copy is kept", phase="commit", transport="shared_memory", tp_size=2)
    for who in (
        "trainer changes the arena after the vote",
        "last rank raises half-way",
        "last rank writes a wrong byte",
    )
)
CASES = (*TRAINER_DEATHS, *RANK_DEATHS, *OWNER_DEATHS, *LIES, *LOCAL_LIES, *KEPT_COPY)


def record(case: Case, outcome: Outcome) -> None:
    """Note that `case` was passed, where a run collects rows."""
    assert case in CASES
    folder = os.environ.get(ROWS_VARIABLE)
    if folder:
        row = {**asdict(case), **asdict(outcome)}
        (Path(folder) / f"{CASES.index(case):03}.json").write_text(json.dumps(row))
