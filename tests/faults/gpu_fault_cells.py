"""Who dies, lies or is late in which phase of an update whose bytes are on a GPU, and the table of what happened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

TRANSPORTS = ("cuda_ipc", "shared_memory", "peer_reads", "nccl")
"""Peer reads: CUDA IPC, from the trainer's GPU to the engine's. NCCL: a process group of the publisher's."""
PHASES = ("begin", "stage", "vote", "commit")
PROMPTLY_S, PROMPTLY_OVER_NCCL_S = 3.0, 10.0
"""A group is left by ending NCCL's communicator, which takes longer."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One fault."""

    who: str
    """What goes wrong."""
    phase: str
    """When."""
    transport: str
    """How the bytes go."""

    def __str__(self) -> str:
        return f"{self.who}, {self.phase}, {self.transport}"

    @property
    def num_gpus(self) -> int:
        """How many it needs."""
        if "rank" in self.who:
            return 3 if self.transport == "nccl" else 2
        return 2 if self.transport in ("peer_reads", "nccl") else 1

    @property
    def promptly_s(self) -> float:
        """How long whoever is left may wait."""
        return PROMPTLY_OVER_NCCL_S if self.transport == "nccl" else PROMPTLY_S


def cells(
    whom: Sequence[str], phases: Sequence[str], transports: Sequence[str] = TRANSPORTS
) -> list[Cell]:
    """All of them."""
    return [
        Cell(who=who, phase=phase, transport=transport)
        for who in whom
        for phase in phases
        for transport in transports
    ]


CELLS = [
    *cells(("kill -9 of the trainer", "kill -9 of the engine"), PHASES),
    *cells(
        ("kill -9 of rank 0 of two", "kill -9 of rank 1 of two"), PHASES, ("peer_reads", "nccl")
    ),
    *cells(["a byte of the arena changes"], ["after it was announced"]),
    *cells(["unknown, misshapen and missing tensors"], ["before the session"]),
    *cells(["a second trainer"], ["in another's session"]),
    *cells(["the trainer leaves"], ["with a session open"]),
    *cells(["a late member of the group"], ["but in time", "after the deadline"], ["nccl"]),
    *cells(["a late trainer with a group"], ["in another's session"], ["nccl"]),
]


def document(rows: dict[str, str], device: str) -> str:
    """The table. rows: seconds, or how it failed, by cell; of those that were run."""
    left_out = [cell for cell in CELLS if str(cell) not in rows]
    numbers = sorted({cell.num_gpus for cell in left_out})
    missing = [
        f"{sum(cell.num_gpus == number for cell in left_out)} that need {number} GPUs"
        for number in numbers
    ]
    lines = [
        "# Faults on a GPU",
        "",
        f"`make gpu-faults` wrote this on {device}: {len(rows)} cells, "
        f"{sum('failed' not in value for value in rows.values())} of them as they should be.",
        f"Left out (–): {', '.join(missing) or 'none'}.",
        "In each, an engine and a trainer with tensors on the GPU, in processes of their own; afterwards the engine",
        "serves one whole version and takes the next one, nothing of the trainer stays open, and no error of the GPU",
        "is left behind. An engine with a rank on each of two GPUs ends when one is killed: nobody waits for it, no",
        "process and no socket is left, and a new engine takes the same trainer's next version.",
        "Seconds from the fault to the last answer that it has to do with.",
        "",
        "| what | when | " + " | ".join(TRANSPORTS) + " |",
        "|---|---|" + "--:|" * len(TRANSPORTS),
    ]
    for who, phase in dict.fromkeys((cell.who, cell.phase) for cell in CELLS):
        row = [Cell(who=who, phase=phase, transport=transport) for transport in TRANSPORTS]
        values = [rows.get(str(cell), "–" if cell in CELLS else "·") for cell in row]
        lines.append(f"| {who} | {phase} | " + " | ".join(values) + " |")
    return "\n".join(lines) + "\n"
