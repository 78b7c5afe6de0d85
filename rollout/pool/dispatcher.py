"""Which prompt runs where, and what happens to it when its replica dies. Decisions alone: no thread, no process.

Prompts wait in one queue in the order in which they came. Each goes to one replica with all of its samples, and runs
again elsewhere, from its beginning, when that replica is lost; samples that the caller has already got stay.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from weight_sync.errors import EngineDiedError, TornWeightsError

from ..errors import EngineClosedError, InvalidRequestError
from ..protocol.commands import ENDED_LATE, PromptSpec, SampleUpdate
from ..sampling_params import mix64
from .job import Job, PoolCall
from .routing import Router

MAX_RID = 240
"""Characters of a request's id at a replica: an engine takes 256, with the number of a sample."""
LOST = (EngineDiedError, EngineClosedError, TornWeightsError)
"""Errors after which a prompt runs again elsewhere: its replica is gone, or its weights are not whole."""


class Target(Protocol):
    """A replica as the dispatcher sees it. Its answers come back through `Dispatcher.update` and `.ended`."""

    @property
    def number(self) -> int:
        """Never another's."""

    @property
    def takes_more(self) -> bool:
        """It may be given prompts."""

    def generate(self, job: Job) -> None:
        """Start a job; returns at once."""

    def abort(self, job: Job, rids: Collection[str]) -> None:
        """End those of `rids` that name a job of its, or samples of it, early; returns at once."""

    def lost(self, error: Exception) -> None:
        """It must not be used: an answer of it, `error`, says so."""


@dataclass(eq=False, slots=True)
class Lane:
    """A replica that has, or may have, something to do."""

    target: Target
    """The way to it."""
    jobs: dict[Job, None] = field(default_factory=dict)
    """What it runs, in the order in which it was given it."""
    load: int = 0
    """Samples that it is busy with."""


_CLOCK_SLACK_S = 0.05
"""By how much a replica may see a deadline earlier."""
_WAITED = f"{ENDED_LATE}: it was still waiting for a replica; raise timeout_s, or add replicas"


class Dispatcher:
    """The queue, and what every replica is busy with. All calls come from one thread."""

    def __init__(
        self,
        router: Router,
        *,
        seed: int,
        max_reruns: int,
        served: Callable[[], tuple[str, int]],
    ) -> None:
        """`served()` is the label and the number of the version that serves."""
        self._router = router
        self._seed = seed
        self._max_reruns = max_reruns
        self._served = served
        self._num_prompts = 0
        self._num_given = 0
        self._calls: dict[
            str, PoolCall
        ] = {}  # by the ids of their samples, until some time after their end
        self._queue: deque[Job] = deque()
        self._lanes: dict[int, Lane] = {}  # by number
        self._blocked: Exception | None = None
        self._refusal: Exception | None = None

    @property
    def num_waiting(self) -> int:
        """Samples that no replica has yet."""
        return sum(job.num_samples for job in self._queue)

    @property
    def loads(self) -> dict[int, int]:
        """Samples that each replica is busy with, of those that were given to it to serve."""
        return {number: lane.load for number, lane in self._lanes.items()}

    # ---- callers -----------------------------------------------------------------------------------------------------

    def add(self, call: PoolCall, prompts: Sequence[PromptSpec]) -> None:
        """Queue the prompts of a call; one whose ids are in use is refused, as by an engine."""
        first = 0
        for spec in prompts:
            self._num_prompts += 1
            if spec.params.sampling_seed is None:
                # Engines count their prompts for this; here a prompt must draw alike wherever it runs.
                seed = mix64(mix64(self._seed) + self._num_prompts) >> 1
                params = msgspec.structs.replace(spec.params, sampling_seed=seed)
                spec = msgspec.structs.replace(spec, params=params)
            affinity = self._router.affinity(spec.input_ids)
            call.jobs.append(Job(call=call, spec=spec, first=first, affinity=affinity))
            first += spec.params.n
        refusal = None if self._early(call) else self._refusal
        refusal = refusal or self._blocked or self._in_use(call)
        if refusal is not None:
            call.fail(refusal)
        else:
            self._calls.update((rid, call) for job in call.jobs for rid in job.sample_rids)
            self._queue.extend(call.jobs)
            self.pump()

    def _early(self, call: PoolCall) -> bool:
        """It waits for a version that is not there yet."""
        return call.min_version > self._served()[1]

    def _in_use(self, call: PoolCall) -> InvalidRequestError | None:
        for rid in (rid for job in call.jobs for rid in job.sample_rids):
            if rid in self._calls and not self._calls[rid].over:
                return InvalidRequestError(
                    f"request id: got {rid!r}, which is in use, expected a new one; use a different rid, or leave it "
                    "out"
                )
        return None

    def abort(self, rids: Iterable[str], abort_all: bool, message: str) -> int:
        """End prompts: those that wait at once, the others on their replicas; returns how many samples."""
        names = set(rids)
        chosen = [job for job in self._jobs() if abort_all or job.named_by(names)]
        num = 0
        for job in chosen:
            num += job.num_samples - len(job.finished)
            if job.replica is None:
                self._queue.remove(job)
                self._end_waiting(job, message)
            elif abort_all or job.spec.rid in names:
                job.aborted = True
                self._lanes[job.replica].target.abort(job, [job.spec.rid])
            else:
                job.aborted = True  # A sample of it; which one, its replica knows.
                self._lanes[job.replica].target.abort(job, sorted(names))
        return num

    def expect_aborts(self, message: str) -> int:
        """Whoever calls is about to end everything that runs; what waits ends here. Returns how many samples waited."""
        for lane in self._lanes.values():
            for job in lane.jobs:
                job.aborted = True
        waiting = list(self._queue)
        self._queue.clear()
        for job in waiting:
            self._end_waiting(job, message)
        return sum(job.num_samples for job in waiting)

    def expire(self, now: float) -> None:
        """End what has waited past its deadline; replicas see to what they have."""
        self._calls = {rid: call for rid, call in self._calls.items() if not call.over}
        late = [job for job in self._queue if job.call.deadline <= now]
        self._queue = deque(job for job in self._queue if job.call.deadline > now)
        served = self._served()[1]
        for job in late:
            least = job.call.min_version
            early = f"{ENDED_LATE}; waited for weight version {least}, got {served}"
            self._end_waiting(job, early if least > served else _WAITED)

    # ---- replicas ----------------------------------------------------------------------------------------------------

    def join(self, target: Target) -> None:
        """A replica that serves the current version is there; nothing happens if it was."""
        if target.number not in self._lanes:
            self._lanes[target.number] = Lane(target)
            self._blocked = None
            self.pump()

    def leave(self, number: int, error: Exception) -> None:
        """A replica is gone, or must not be used: what it was doing runs again elsewhere."""
        lane = self._lanes.pop(number, None)
        if lane is None:
            return
        for job in lane.jobs:  # It may be alive, and come back.
            lane.target.abort(job, [job.spec.rid])
        for job in reversed(lane.jobs):
            self._run_again(job, error)
        self.pump()

    def refuse(self, error: Exception | None) -> None:
        """Fail new calls and hand out nothing, while no replica can compute; None ends it."""
        self._refusal = error
        self.pump()

    def block(self, error: Exception) -> None:
        """No replica will come: fail what waits, and every later call, until one joins."""
        self._blocked = error
        for call in {id(job.call): job.call for job in self._queue}.values():
            self._fail(call, error)

    def update(self, job: Job, attempt: int, update: SampleUpdate) -> None:
        """A replica tells of a sample, by its number within the prompt."""
        if job.attempt != attempt or job.call.over:
            return
        sample, reason = update.index, update.finish_reason
        if reason is not None:
            self._unload(job, 1)
            late = time.monotonic() >= job.call.deadline - _CLOCK_SLACK_S
            if reason.type == "abort" and not job.aborted and not late:
                return  # Nobody asked for it: the replica is ending, and the sample is lost with it.
        if sample not in job.finished:
            if reason is not None:
                job.finished.add(sample)
            job.call.emit(
                msgspec.structs.replace(
                    update,
                    index=job.first + sample,
                    rid=job.sample_rid(sample),
                    num_reruns=job.num_reruns,
                    e2e_latency=time.monotonic() - job.call.began,
                )
            )
        if reason is not None:
            self.pump()

    def ended(self, job: Job, attempt: int, error: BaseException | None) -> None:
        """A replica is done with a job, in whatever way."""
        number = job.replica
        if job.attempt != attempt or number is None:
            return
        if isinstance(error, TornWeightsError) and self._refusal is not None:
            self._take_back(job)
            self._queue.appendleft(job)  # It came too late; its replica is as it should be.
            return
        if isinstance(error, LOST):
            self._lanes[number].target.lost(error)
            self.leave(number, error)
            return
        self._take_back(job)
        if error is not None:
            self._fail(job.call, error)
        elif job.complete:
            job.call.finish_if_complete()
        else:
            self._run_again(job, EngineDiedError("its replica ended requests by itself"))
        self.pump()

    def pump(self) -> None:
        """Hand out what waits, in order, as far as there is room."""
        while self._queue and self._refusal is None:
            job = next((job for job in self._queue if not self._early(job.call)), None)
            if job is None:
                return
            loads = {n: lane.load for n, lane in self._lanes.items() if lane.target.takes_more}
            number = self._router.choose(job.affinity, job.num_samples, loads)
            if number is None:
                return
            self._queue.remove(job)
            if job.call.over:
                continue
            job.replica, job.load = number, job.num_samples
            job.attempt += 1
            lane = self._lanes[number]
            lane.jobs[job] = None
            lane.load += job.load
            self._num_given += 1
            job.wire_rid = f"{self._num_given}.{job.spec.rid}"[:MAX_RID]
            try:
                lane.target.generate(job)
            except (
                Exception
            ) as error:  # Whatever it is, it is about this prompt, and takes nothing along.
                self._take_back(job)
                self._fail(job.call, error)

    # ---- below -------------------------------------------------------------------------------------------------------

    def _jobs(self) -> list[Job]:
        return [*self._queue, *(job for lane in self._lanes.values() for job in lane.jobs)]

    def _run_again(self, job: Job, error: Exception) -> None:
        """Put a lost job in front of the queue, unless it was to be ended, or is lost again and again."""
        self._take_back(job)
        job.attempt += 1  # Whatever still comes of the last attempt is late.
        if job.complete:
            job.call.finish_if_complete()
        if job.call.over:
            return
        if job.aborted:
            self._end_waiting(job, "aborted by the caller; its replica died")
            return
        if job.num_reruns == self._max_reruns:
            self._fail(job.call, error)
            return
        job.num_reruns += 1
        self._queue.appendleft(job)
        if self._blocked is not None:
            self.block(self._blocked)

    def _take_back(self, job: Job) -> None:
        """It is on no replica any more."""
        if job.replica in self._lanes:
            self._lanes[job.replica].jobs.pop(job, None)
        self._unload(job, job.load)
        job.replica = None

    def _unload(self, job: Job, num_samples: int) -> None:
        job.load -= num_samples
        if job.replica in self._lanes:
            self._lanes[job.replica].load -= num_samples

    def _end_waiting(self, job: Job, message: str) -> None:
        for sample in range(job.num_samples):
            if sample not in job.finished:
                job.finished.add(sample)
                job.call.emit(job.empty_sample(sample, message, *self._served()))
        job.call.finish_if_complete()

    def _fail(self, call: PoolCall, error: BaseException) -> None:
        """End a call: its other prompts are not wanted any more."""
        call.fail(error)
        for job in call.jobs:
            if job.replica in self._lanes and not job.complete:
                self._lanes[job.replica].target.abort(job, [job.spec.rid])
        self._queue = deque(job for job in self._queue if job.call is not call)
