"""One engine of a pool: its executor, where it stands, and how it is given work."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from weight_sync.errors import EngineDiedError, TornWeightsError
from weight_sync.time_left import left_s
from weight_sync.wire.futures import when_all_are_done

from ..engine.executors.executor import Executor
from ..protocol.commands import AbortRequests, SampleUpdate
from .dispatcher import Dispatcher
from .fleet import GONE
from .job import Job
from .states import State

ABORT_TIMEOUT_S = 30.0

Post = Callable[[Callable[[], None]], None]
"""Runs an action on the pool's thread; any thread may call."""


class ReplicaExecutor(Executor, Protocol):
    """An executor in processes of its own, which can be ended from here."""

    def kill(self) -> None:
        """End its processes now, whatever they do, and give everything back."""


class ReplicaStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One replica, for people and for tests."""

    number: int
    """Its number; never used again after its end."""
    state: str
    """"serving", "behind" (not at the pool's version), "retiring"."""
    address: str
    """Where it listens."""
    num_inflight: int
    """Samples that it was given and has not finished."""
    pids: tuple[int, ...]
    """Processes of its ranks."""
    node_id: str | None
    """Ray's name of its node; None without Ray."""
    why_behind: str | None
    """Why it does not serve; None: it does."""


@dataclass(eq=False, kw_only=True)
class Replica:
    """A replica. Its fields are the pool's thread's, its answers come there."""

    number: int
    """Never used again after its end."""
    slot: int
    """Its place in the pool, used again by its successor, as bundles of a placement group are."""
    executor: ReplicaExecutor
    """The way to it."""
    dispatcher: Dispatcher
    """Takes its answers."""
    post: Post
    """To the pool's thread."""
    changed: Callable[[], None]
    """Looks at all replicas anew; called there."""
    came: Future[int]
    """Has its number once it serves, or why it does not."""
    state: State = State.COMING
    """What `states.decide` said last."""
    asked: bool = True
    """See `states.Facts`."""
    denied: Exception | None = None
    """Likewise; the answer."""
    dead: Exception | None = None
    """Likewise; how one knows."""
    tried: int | None = None
    """The version that it could not be brought to; None: it was not tried in vain."""
    again: float = 0.0
    """When it is tried again although nothing has changed, on the monotonic clock."""
    num_failures: int = 0
    """How often in a row it could not be."""
    has_served: bool = False
    """It held the served version once."""
    leaving: tuple[float, Future[int]] | None = None
    """When it ends at the latest, and who waits for that; None: it stays."""
    check: Future[Any] | None = None
    """The last question after its health."""

    @property
    def takes_more(self) -> bool:
        """It may be given prompts."""
        return self.leaving is None

    def lost(self, error: Exception) -> None:
        """An answer says that it must not be used: its weights are no version, or it has died."""
        if isinstance(error, TornWeightsError):
            self.denied = error
        else:
            self.dead = error

    def generate(self, job: Job) -> None:
        """Start a job; returns at once."""
        attempt, dispatcher, post = job.attempt, self.dispatcher, self.post

        def end(error: BaseException | None) -> None:
            dispatcher.ended(job, attempt, error)
            self.changed()

        def on_chunk(update: SampleUpdate) -> None:
            if isinstance(update, SampleUpdate):
                post(lambda: dispatcher.update(job, attempt, update))

        def on_end(future: Future[Any]) -> None:
            error = future.exception()
            post(lambda: end(error))

        # One that is late already comes back at once, as any other does at its deadline.
        timeout_s = left_s(job.call.deadline) + job.call.grace_s
        future = self.executor.submit(job.command, timeout_s=timeout_s, on_chunk=on_chunk)
        future.add_done_callback(on_end)

    def abort(self, job: Job, rids: Collection[str]) -> None:
        """End those of `rids` that are its job's early; their partial results come as any other."""
        command = AbortRequests(rids=job.wire_rids(rids))
        self.executor.submit(command, timeout_s=ABORT_TIMEOUT_S)

    def status(self, load: int, why: Exception | None) -> ReplicaStatus:
        """What it looks like now."""
        executor: Any = self.executor
        behind = self.state in (State.COMING, State.BEHIND)
        return ReplicaStatus(
            number=self.number,
            state=State.BEHIND.value if behind else self.state.value,
            address=executor.address,
            num_inflight=load,
            pids=tuple(getattr(executor, "pids", ())),
            node_id=getattr(executor, "node_id", None),
            why_behind=str(why) if behind and why is not None else None,
        )


def when_all_have_answered(
    asked: Sequence[Future[Any]], post: Post, then: Callable[[], None]
) -> None:
    """Run `then` on the pool's thread when these are done."""
    when_all_are_done(asked, lambda: post(then))


def answers_of(asked: Sequence[Future[Any]]) -> list[Any]:
    """What replicas answered; the dead do not count, unless all are. Raises the first refusal."""
    errors = [error for done in asked if (error := done.exception()) is not None]
    answers = [done.result() for done in asked if done.exception() is None]
    refusals = [error for error in errors if not isinstance(error, GONE)]
    for error in refusals or (errors if not answers else ()):
        raise error
    if not answers:
        raise EngineDiedError("no replica of the pool is alive at present")
    return answers
