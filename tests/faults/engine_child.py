"""An engine process that stops where a test wants it to, or fails there: `rollout.engine.child` with breakpoints.

Files in the folder FAULT_POINTS are the breakpoints. While `stop-<point>-<rank>` exists, that rank waits at that point,
after it has made `at-<point>-<rank>`. `fail-<point>-<rank>` makes it raise there, once, and `damage-<rank>` makes its
next commit write a wrong byte.

begin, stage, vote    before the receiver carries the message out
step                  before a step of the engine loop
commit                inside the pause: this rank's bytes are the new version's, nothing is compared yet
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FOLDER = Path(os.environ["FAULT_POINTS"])


def pass_point(point: str, rank: int) -> None:
    """Stop or fail here if that is what the test wants."""
    stop = FOLDER / f"stop-{point}-{rank}"
    if stop.exists():
        (FOLDER / f"at-{point}-{rank}").touch()
        while stop.exists():
            time.sleep(0.002)
    fail = FOLDER / f"fail-{point}-{rank}"
    if fail.exists():
        fail.unlink()
        raise RuntimeError(f"{point} broke on purpose")


def before(cls: Any, method: str, point: str) -> None:
    """Put a point before a method of the receiver."""
    original: Callable[..., Any] = getattr(cls, method)

    def stopping(self: Any, *arguments: Any) -> Any:
        pass_point(point, self._agreement.rank)
        return original(self, *arguments)

    setattr(cls, method, stopping)


def main() -> int:
    import torch

    from rollout.engine import child
    from rollout.engine.core import EngineCore
    from weight_sync.commit import WeightCommit
    from weight_sync.receiver import WeightReceiver

    before(WeightReceiver, "begin", "begin")
    before(WeightReceiver, "stage", "stage")
    before(WeightReceiver, "prepare", "vote")
    maps: list[Any] = []
    make, replay = WeightReceiver.__init__, WeightCommit._replay

    def make_and_keep(self: Any, weight_map: Any, *arguments: Any, **options: Any) -> None:
        maps.append(weight_map)
        make(self, weight_map, *arguments, **options)

    def replay_and_stop(self: Any) -> None:
        replay(self)
        rank = self.agreement.rank
        damage = FOLDER / f"damage-{rank}"
        if damage.exists():
            damage.unlink()
            next(iter(maps[0].parameters.values())).data.view(torch.uint8)[0, 2] ^= 1
        pass_point("commit", rank)

    step = EngineCore.step

    def step_and_stop(self: Any) -> bool:
        pass_point("step", self._ranks.spec.rank)
        return step(self)

    EngineCore.step = step_and_stop  # type: ignore[method-assign]
    WeightReceiver.__init__ = make_and_keep  # type: ignore[method-assign]
    WeightCommit._replay = replay_and_stop  # type: ignore[method-assign]
    return child.main()


if __name__ == "__main__":
    sys.exit(main())
