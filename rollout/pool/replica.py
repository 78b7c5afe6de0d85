"""One engine of a pool: its executor, where its answers go, and what it looks like from outside."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

import msgspec

from weight_sync.errors import EngineDiedError

from ..engine.executors.executor import Executor
from ..protocol.commands import AbortRequests, GetStatus, SampleUpdate, Status
from .dispatcher import Dispatcher
from .job import Job
from .members import GONE

ABORT_TIMEOUT_S = 30.0


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


class Replica:
    """A replica as the dispatcher uses it; `post` brings its answers to the dispatcher's thread."""

    def __init__(
        self,
        number: int,
        executor: ReplicaExecutor,
        dispatcher: Dispatcher,
        post: Callable[[Callable[[], None]], None],
        clock: Callable[[], float],
    ) -> None:
        self.number = number
        self.executor = executor
        self._dispatcher = dispatcher
        self._post = post
        self._clock = clock

    def generate(self, job: Job) -> None:
        """Start a job; returns at once."""
        attempt, dispatcher, post = job.attempt, self._dispatcher, self._post

        def on_chunk(update: SampleUpdate) -> None:
            if isinstance(update, SampleUpdate):
                post(lambda: dispatcher.update(job, attempt, update))

        def on_end(future: Future[Any]) -> None:
            error = future.exception()
            post(lambda: dispatcher.ended(job, attempt, error))

        # One that is late already comes back at once, as any other does at its deadline.
        left_s = max(0.001, job.call.deadline - self._clock()) + job.call.grace_s
        future = self.executor.submit(job.command, timeout_s=left_s, on_chunk=on_chunk)
        future.add_done_callback(on_end)

    def abort(self, job: Job, rids: Collection[str]) -> None:
        """End those of `rids` that are its job's early; their partial results come as any other."""
        command = AbortRequests(rids=job.wire_rids(rids))
        self.executor.submit(command, timeout_s=ABORT_TIMEOUT_S)

    def check(self, timeout_s: float) -> Status:
        """Ask for its status; raises when it does not answer in time, or is dead."""
        future = self.executor.submit(GetStatus(), timeout_s=timeout_s)
        status: Status = future.result(timeout_s + 1.0)
        return status


def ask_all(
    replicas: Sequence[Replica],
    body: Any,
    timeout_s: float,
    combine: Callable[[Sequence[Any]], Any],
    future: Future[Any],
    post: Callable[[Callable[[], None]], None],
) -> None:
    """Put every replica's answer to a command, combined, into `future`; `combine` runs where `post` puts it.

    Replicas that die meanwhile do not count, unless all do; the first other error does.
    """
    asked = [replica.executor.submit(body, timeout_s=timeout_s) for replica in replicas]
    missing, lock = len(asked), threading.Lock()

    def conclude() -> None:
        errors = [error for done in asked if (error := done.exception()) is not None]
        answers = [done.result() for done in asked if done.exception() is None]
        refusals = [error for error in errors if not isinstance(error, GONE)]
        if refusals or not answers:
            future.set_exception((refusals or errors)[0])
        else:
            future.set_result(combine(answers))

    def note(_: Future[Any]) -> None:
        nonlocal missing
        with lock:
            missing -= 1
            last = missing == 0
        if last:
            post(conclude)

    if not asked:
        future.set_exception(EngineDiedError("no replica of the pool is alive at present"))
    for one in asked:
        one.add_done_callback(note)
