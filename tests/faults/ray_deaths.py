"""What happens when a `RolloutActor` is killed, and what tests of engines on Ray look at."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from engine_deaths import NEW, RemoteClient, all_gone
from engine_faults import (
    PROMPTLY_S,
    Breakpoints,
    FaultyEngine,
    Nursery,
    Stream,
    engine_options,
    kill_all,
    num_descriptors,
    use_breakpoints,
    wait_for,
)
from fault_matrix import UPDATE, Case, Outcome
from forks import Zygote
from versions import Reference

from rollout import RolloutActor

ANSWER_S = 240.0
SPARE_DESCRIPTORS = 6
"""Fewer than the cases that share an actor, so that one more for each case is found out."""


class ActorEngine:
    """The methods of an engine that runs in an actor, called as if it were one of this process."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def __getattr__(self, name: str) -> Any:
        import ray

        method = getattr(self._handle, name)
        return lambda *args, **kw: ray.get(method.remote(*args, **kw), timeout=ANSWER_S)

    def generate(self, *, stream: bool = False, **arguments: Any) -> Any:
        """As `Engine.generate`."""
        if stream:
            return self._stream(arguments)
        return self.__getattr__("generate")(**arguments)

    def _stream(self, arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
        import ray

        for chunk in self._handle.generate_stream.remote(**arguments):
            yield ray.get(chunk, timeout=ANSWER_S)


class FaultyActor(FaultyEngine):
    """A `RolloutActor` with breakpoints; those of several ranks have none, because they are processes of the actor."""

    def __init__(
        self, folder: Path, points: Path, reference: Reference, zygote: Zygote, **options: Any
    ) -> None:
        self.folder = folder
        self.points = Breakpoints(points)
        self.reference = reference
        self.tp_size = options.get("tp_size", 1)
        use_breakpoints(points, zygote)
        chosen = engine_options(**options)
        chosen.pop("executor")
        self.handle = RolloutActor.options(num_cpus=1).remote(str(folder), **chosen)
        self.engine: Any = ActorEngine(self.handle)
        self._address: str = self.engine.address()
        self._allowed: list[int] = []
        process = psutil.Process(self.engine.status().pid)
        if self.tp_size > 1:
            process = process.parent()
        self._pids = [process.pid, *(child.pid for child in process.children(recursive=True))]
        assert len(self._pids) == (1 if self.tp_size == 1 else 1 + self.tp_size)

    @property
    def pids(self) -> list[int]:
        """Of the actor and what it has started."""
        return self._pids

    @property
    def address(self) -> str:
        """Where trainers connect."""
        return self._address

    def allowed_descriptors(self) -> list[int]:
        """In an actor Ray opens connections of its own, when it likes: a few more than before the first test."""
        if not self._allowed:
            self._allowed = [num_descriptors(pid) + SPARE_DESCRIPTORS for pid in self.pids]
        return self._allowed

    def close(self) -> None:
        """End the actor; nothing of it may survive."""
        import ray

        self.points.clear()
        ray.kill(self.handle)
        all_gone(self.pids)


def actor_dies(case: Case, actor: FaultyActor, nursery: Nursery) -> Outcome:
    """End an actor by a signal, or by Ray, in a phase of an update; nobody waits for it."""
    import ray

    stream, client, trainer = Stream(actor.engine), RemoteClient(actor.address), None
    if case.phase in UPDATE:
        actor.points.stop(case.phase, 0)
        trainer = nursery.trainer(actor.address, actor.folder, NEW, transport=case.transport)
        actor.points.reached(case.phase, 0)
    start = time.monotonic()
    if case.who == "actor killed":
        kill_all(actor.pids[:1])
    else:
        ray.kill(actor.handle)
    assert isinstance(stream.died(), ray.exceptions.RayActorError)
    assert client.error_name() == "EngineDiedError"
    all_gone(actor.pids)
    if trainer is not None:
        assert trainer.says()["error"] == "EngineDiedError"
        trainer.kill()
    seconds = time.monotonic() - start
    assert seconds < PROMPTLY_S
    return Outcome(result="actor ends", seconds=seconds)


def sockets_in(folder: Path) -> set[str]:
    """Private folders for sockets that processes of a cluster have made."""
    return {name for name in os.listdir(folder) if name.startswith("rollout-")}


def no_room_is_taken(num_cpus: int) -> None:
    """All placement groups were given back."""
    import ray

    wait_for("free CPUs", lambda: ray.available_resources().get("CPU", 0.0) == num_cpus)


def open_what_stays_open() -> None:
    """Let Ray open what it keeps open in this process after its first actor."""
    import ray

    class Nothing:
        """Does nothing."""

    actor = ray.remote(Nothing).remote()
    ray.get(actor.__ray_ready__.remote(), timeout=ANSWER_S)
    ray.kill(actor)
