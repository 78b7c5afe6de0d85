"""Breakpoints inside the processes of an engine: a rank stops where a test wants it to, or fails there.

Files in a folder are the breakpoints. While `stop-<point>-<whom>` exists, that rank waits at that point, after it has
made `at-<point>-<whom>`. `hang-<point>-<whom>` makes it wait there for ever, with the interpreter's lock: no thread of
it does anything any more. `fail-<point>-<whom>` makes it raise there, once, and `damage-<whom>` makes its next commit
write a wrong byte. `<whom>` is the number of a rank, or `pid` and a process id where several engines have equal ranks.

begin, stage, vote    before the receiver carries the message out
step                  before a step of the engine loop
commit                inside the pause: this rank's bytes are the new version's, nothing is compared yet
verify                after it, where the new version is compared while the engine runs on
end                   after the loop, before anything is given back

A rank that gets a SIGUSR1 says on standard error what its threads do.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Points:
    """The folder, as seen from inside an engine's process."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def find(self, what: str, rank: int) -> Path | None:
        """The file for `what` that means this process, if there is one."""
        for whom in (str(rank), f"pid{os.getpid()}"):
            path = self._folder / f"{what}-{whom}"
            if path.exists():
                return path
        return None

    def pass_point(self, point: str, rank: int) -> None:
        """Stop, hang or fail here if that is what the test wants."""
        stop = self.find(f"stop-{point}", rank)
        if stop is not None:
            (self._folder / stop.name.replace("stop-", "at-", 1)).touch()
            while stop.exists():
                time.sleep(0.002)
        hang = self.find(f"hang-{point}", rank)
        if hang is not None:
            (self._folder / hang.name.replace("hang-", "at-", 1)).touch()
            while True:
                ctypes.PyDLL(None).sleep(1000)
        fail = self.find(f"fail-{point}", rank)
        if fail is not None:
            fail.unlink()
            raise RuntimeError(f"{point} broke on purpose")

    def damages(self, rank: int) -> bool:
        """Whether this commit shall write a wrong byte."""
        path = self.find("damage", rank)
        if path is not None:
            path.unlink()
        return path is not None


def install(folder: Path) -> None:
    """Put all points into this process, before it makes an engine."""
    import torch

    from rollout.engine.loop import core, ranks
    from rollout.engine.loop.core import EngineCore
    from weight_sync.receiver import service
    from weight_sync.receiver.commit import WeightCommit
    from weight_sync.receiver.receiver import WeightReceiver

    faulthandler.register(signal.SIGUSR1)
    points = Points(folder)
    service._SWEEP_INTERVAL_S = 0.05
    silence = folder / "silence"
    if silence.exists():
        ranks.SILENCE_S = float(silence.read_text())
        core.HEARTBEAT_S = ranks.SILENCE_S / 4
    _before(points, WeightReceiver, "begin", "begin")
    _before(points, WeightReceiver, "stage", "stage")
    _before(points, WeightReceiver, "prepare", "vote")
    maps: list[Any] = []
    make, replay, step = WeightReceiver.__init__, WeightCommit._replay, EngineCore.step
    verify, close = WeightCommit._verify_overlapped, EngineCore._close

    def make_and_keep(self: Any, weight_map: Any, *arguments: Any, **options: Any) -> None:
        maps.append(weight_map)
        make(self, weight_map, *arguments, **options)

    def replay_and_stop(self: Any, **options: Any) -> Any:
        written = replay(self, **options)
        rank = self.agreement.rank
        if points.damages(rank):
            next(iter(maps[0].parameters.values())).data.view(torch.uint8)[0, 2] ^= 1
        points.pass_point("commit", rank)
        return written

    def step_and_stop(self: Any) -> bool:
        points.pass_point("step", self._ranks.spec.rank)
        return step(self)

    def stop_and_verify(self: Any) -> None:
        points.pass_point("verify", self.agreement.rank)
        verify(self)

    def stop_and_close(self: Any, *arguments: Any, **options: Any) -> None:
        points.pass_point("end", self._ranks.spec.rank)
        close(self, *arguments, **options)

    EngineCore.step = step_and_stop  # type: ignore[method-assign]
    EngineCore._close = stop_and_close  # type: ignore[method-assign]
    WeightCommit._verify_overlapped = stop_and_verify  # type: ignore[method-assign]
    WeightReceiver.__init__ = make_and_keep  # type: ignore[method-assign]
    WeightCommit._replay = replay_and_stop  # type: ignore[method-assign]


def _before(points: Points, cls: Any, method: str, point: str) -> None:
    """Put a point before a method of the receiver."""
    original: Callable[..., Any] = getattr(cls, method)

    def stopping(self: Any, *arguments: Any) -> Any:
        points.pass_point(point, self._agreement.rank)
        return original(self, *arguments)

    setattr(cls, method, stopping)
