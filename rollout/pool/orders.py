"""What a pool was asked for that holds for later replicas too: pauses, released memory, limits."""

from __future__ import annotations

import time
from typing import Any

import msgspec

from ..protocol.commands import (
    ContinueGeneration,
    MemoryTag,
    PauseGeneration,
    ReleaseMemory,
    ResumeMemory,
    SetLimits,
    SlowDown,
)


class StandingOrders:
    """Used by the pool's thread alone."""

    KINDS = (
        *(PauseGeneration, ContinueGeneration, ReleaseMemory, ResumeMemory),
        *(SlowDown, SetLimits),
    )
    """The commands that hold for later replicas."""

    def __init__(self) -> None:
        self._pause: tuple[PauseGeneration, float] | None = None
        self._released: set[MemoryTag] = set()
        self._keeps = False  # The released weights come back as they were.
        self._tuned: dict[str, SlowDown | SetLimits] = {}

    def note(self, command: Any) -> None:
        """The pool was asked for it; `command` is one of `KINDS`."""
        if isinstance(command, PauseGeneration):
            self._pause = command, time.monotonic() + command.lease_s
        elif isinstance(command, ContinueGeneration):
            self._pause = None
        elif isinstance(command, ReleaseMemory):
            self._released |= set(command.tags)
            self._keeps |= command.keep_weights
        elif isinstance(command, ResumeMemory):
            self._released -= set(command.tags)
            self._keeps &= "weights" in self._released
        elif isinstance(command, SlowDown):
            self._tuned["seconds"] = command
        else:  # One by one: each may be refused alone.
            given = {n: v for n, v in msgspec.structs.asdict(command).items() if v is not None}
            self._tuned |= {name: SetLimits(**{name: value}) for name, value in given.items()}

    @property
    def weights_are_released(self) -> bool:
        """There is no memory for weights."""
        return "weights" in self._released

    @property
    def limits(self) -> list[Any]:
        """What one replica refuses of these, all have refused."""
        return list(self._tuned.values())

    @property
    def conditions(self) -> list[Any]:
        """What a replica must carry out before it takes part."""
        told: list[Any] = []
        if self._pause is not None and (left_s := self._pause[1] - time.monotonic()) > 0:
            told.append(msgspec.structs.replace(self._pause[0], lease_s=left_s))
        if self._released:
            told.append(ReleaseMemory(tags=sorted(self._released), keep_weights=self._keeps))
        return told
