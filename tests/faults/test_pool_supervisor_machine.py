"""A pool's decisions under any order of events: starts, deaths, updates that replicas miss, requests and their ends.

No process and no thread: executors and the fleet are stand-ins, and what would run elsewhere runs when the machine says
so. Every request ends, each sample reaches its caller once, and work is only where the served version is.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from rollout.pool import supervisor as supervision
from rollout.pool.config import PoolConfig
from rollout.pool.dispatcher import Dispatcher
from rollout.pool.job import PoolCall
from rollout.pool.replica import State
from rollout.pool.routing import Router
from rollout.pool.supervisor import Supervisor
from rollout.protocol.commands import (
    Done,
    FinishReason,
    Generate,
    PromptSpec,
    SampleUpdate,
    Span,
)
from rollout.sampling_params import SamplingParams
from weight_sync.errors import EngineDiedError, TornWeightsError, WeightUpdateError

POOL = PoolConfig(num_replicas=2, max_start_failures=3, max_reruns=1000)


@dataclass
class Prompt:
    """What a replica was given."""

    command: Generate
    on_chunk: Callable[[Any], None]
    future: Future[Any]
    num_told: int = 0

    def tell(self) -> None:
        """One more of its samples has finished."""
        if self.num_told < self.command.prompts[0].params.n:
            self.num_told += 1
            self.on_chunk(finished(self.num_told - 1))


class Engine:
    """What a replica's executor does, as far as the pool sees it."""

    def __init__(self) -> None:
        self.dead = self.killed = self.torn = False
        self.prompts: list[Prompt] = []

    def submit(self, body: Any, *, timeout_s: float, on_chunk: Any = None) -> Future[Any]:
        future: Future[Any] = Future()
        if self.dead:
            future.set_exception(EngineDiedError("dead"))
        elif isinstance(body, Generate):
            self.prompts.append(Prompt(body, on_chunk, future))
        else:
            future.set_result(None)
        return future

    def weight_channel(self) -> Any:
        return None

    def kill(self) -> None:
        self.die()
        self.killed = True

    def close(self) -> None:
        self.kill()

    def die(self) -> None:
        self.dead = True
        while self.prompts:
            self.prompts.pop().future.set_exception(EngineDiedError("dead"))

    def work(self, which: int, error: Exception | None = None) -> None:
        """One of its prompts ends: with all samples, or with an error."""
        prompt = self.prompts.pop(which % len(self.prompts))
        if error is not None:
            prompt.future.set_exception(error)
            return
        num = prompt.command.prompts[0].params.n
        for _ in range(num):
            prompt.tell()
        prompt.future.set_result(Done(count=num))


class Fleet:
    """What replicas hold, by their number, as the machine has it."""

    def __init__(
        self, changed: Callable[[], None], brought_up: Callable[[int, Exception | None], None]
    ) -> None:
        self.brought_up = brought_up
        self.served = SimpleNamespace(version=0, label="0")
        self.lost: str | None = None
        self.holds: dict[int, bool] = {}
        self.behind: dict[int, Exception] = {}
        self.asked: list[tuple[int, Future[None]]] = []
        self._changed = changed

    @property
    def serving(self) -> set[int]:
        return {number for number, holds in self.holds.items() if holds}

    def add(self, member: Any) -> Future[None]:
        self.holds[member.number] = False
        return self.bring_up(member.number)

    def bring_up(self, number: int) -> Future[None]:
        self.holds[number] = False
        future: Future[None] = Future()
        self.asked.append((number, future))
        return future

    def remove(self, number: int) -> None:
        self.holds.pop(number, None)
        self.behind.pop(number, None)

    def answer(self, which: int, error: Exception | None) -> None:
        number, future = self.asked.pop(which % len(self.asked))
        self.brought_up(number, error)
        if number not in self.holds:
            future.set_result(None)  # It was forgotten meanwhile.
            return
        self.say(number, error)
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)

    def say(self, number: int, error: Exception | None) -> None:
        """What a replica holds: the served version, or another one."""
        self.holds[number] = error is None
        self.behind.pop(number, None)
        if error is not None:
            self.behind[number] = error
        self._changed()


class Pool(RuleBasedStateMachine):
    """Supervisor and dispatcher, and all that may happen around them."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Callable[[], None]] = []
        self.background: list[Callable[[], None]] = []
        patch = mock.patch.object(
            supervision,
            "_in_background",
            lambda function, *args: self.background.append(lambda: function(*args)),
        )
        patch.start()
        self._undo = patch.stop
        self.engines: list[Engine] = []
        self.starts_fail = self.some_start_failed = False
        self.num_retired = 0
        self.fleet: Any = Fleet(lambda: self.events.append(self.pool.reconcile), self.is_written)
        self.requests = Dispatcher(
            Router(limit=3, affinity_tokens=0, slack=8),
            seed=1,
            max_reruns=POOL.max_reruns,
            on_lost=lambda number, error: self.pool.lost(number, error),
            served=lambda: (self.fleet.served.label, self.fleet.served.version),
        )
        self.pool = Supervisor(
            POOL,
            make_executor=self.make_executor,
            dispatcher=self.requests,
            fleet=self.fleet,
            post=self.events.append,
        )
        self.calls: list[tuple[PoolCall, list[SampleUpdate]]] = []
        self.came: list[Future[int]] = []
        for _ in range(POOL.num_replicas):
            self.one_more()
        self.all_goes_well(1000)

    def is_written(self, number: int, error: Exception | None) -> None:
        """A replica has been brought to the served version."""
        if error is None and number in self.pool.replicas:
            self.engine_of(number).torn = False

    def engine_of(self, number: int) -> Engine:
        engine: Any = self.pool.replicas[number].executor
        return engine

    def make_executor(self, slot: int) -> Any:
        if self.starts_fail:
            self.some_start_failed = True
            raise RuntimeError("no room")
        self.engines.append(Engine())
        return self.engines[-1]

    # ---- what may happen ---------------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.pool.replicas) < 4)
    @rule()
    def one_more(self) -> None:
        self.came.append(Future())
        self.pool.start(self.came[-1])

    @precondition(lambda self: self.background)
    @rule(which=st.integers(0, 5), fails=st.booleans())
    def something_in_the_background(self, which: int, fails: bool) -> None:
        self.starts_fail = fails
        self.background.pop(which % len(self.background))()
        self.starts_fail = False

    @precondition(lambda self: self.events)
    @rule(num=st.integers(1, 6))
    def handle(self, num: int) -> None:
        """The pool's thread comes to what has happened, in its order."""
        for _ in range(min(num, len(self.events))):
            self.events.pop(0)()

    @rule(num=st.integers(1, 4), n=st.integers(1, 3))
    def ask(self, num: int, n: int) -> None:
        seen: list[SampleUpdate] = []
        call = PoolCall(stream=False, deadline=time.monotonic() + 3600.0, on_chunk=seen.append)
        self.calls.append((call, seen))
        first = sum(len(c.jobs) for c, _ in self.calls)
        prompts = [
            PromptSpec(rid=f"r{first + i}", input_ids=[1, 2, 3], params=SamplingParams(n=n))
            for i in range(num)
        ]
        self.requests.add(call, prompts)

    @precondition(lambda self: any(engine.prompts for engine in self.engines))
    @rule(which=st.integers(0, 9), how=st.sampled_from(["end", "tell", "torn"]))
    def work(self, which: int, how: str) -> None:
        busy = [engine for engine in self.engines if engine.prompts]
        engine = busy[which % len(busy)]
        if how == "tell":
            engine.prompts[which % len(engine.prompts)].tell()
            return
        runs = {
            id(r.executor): self.requests._running.get(n) for n, r in self.pool.replicas.items()
        }
        # That weights are torn is said to all requests, and heard if the pool still waits for one of them.
        engine.torn = engine.torn or (how == "torn" and bool(runs.get(id(engine))))
        while engine.torn and engine.prompts:
            engine.work(0, TornWeightsError("torn"))
        if engine.prompts:
            engine.work(which)

    @precondition(lambda self: self.alive)
    @rule(which=st.integers(0, 9))
    def die(self, which: int) -> None:
        """Somebody notices: a request, an answer about health, or the fleet."""
        engine = self.alive[which % len(self.alive)]
        engine.die()

    @precondition(lambda self: self.fleet.asked)
    @rule(which=st.integers(0, 5), fails=st.booleans())
    def brought_up(self, which: int, fails: bool) -> None:
        self.fleet.answer(which, WeightUpdateError("no room for weights") if fails else None)

    @rule(missed=st.sets(st.integers(0, 9)))
    def publish(self, missed: set[int]) -> None:
        """A new version, which some replicas do not have."""
        self.fleet.served.version += 1
        for number in list(self.fleet.holds):
            error = WeightUpdateError("it took no part in it") if number in missed else None
            self.fleet.say(number, error)
            self.is_written(number, error)

    @rule(lost=st.booleans())
    def memory(self, lost: bool) -> None:
        """The weights' memory is given back everywhere, or is there again: then all are asked what they hold."""
        asked = self.fleet.holds.keys() & self.pool.replicas.keys()
        torn = [number for number in asked if self.engine_of(number).torn]
        self.fleet.lost = "released" if lost or (torn and len(torn) == len(asked)) else None
        for number in torn if self.fleet.lost is None else ():
            self.fleet.say(number, TornWeightsError("torn"))
        self.events.append(self.pool.reconcile)

    @precondition(lambda self: len(self.requests.loads) > 1)
    @rule(which=st.integers(0, 9))
    def retire(self, which: int) -> None:
        serving = [r for r in self.pool.replicas.values() if r.state is State.SERVING]
        if len(serving) > 1:
            done: Future[int] = Future()
            end = time.monotonic() + 3600.0
            self.num_retired += 1
            self.pool.retire(serving[which % len(serving)].number, end, done)

    @rule(num=st.integers(1, 30))
    def all_goes_well(self, num: int) -> None:
        """Starts succeed, replicas come to the served version, and the pool's thread hears of it."""
        for _ in range(num):
            if self.background:
                self.background.pop(0)()
            if self.events:
                self.events.pop(0)()
            elif self.fleet.asked:
                self.fleet.answer(0, None)

    @rule()
    def time_passes(self) -> None:
        """Health is asked for, what is due starts, who has finished leaves."""
        self.pool.tick(time.monotonic() + 3000.0)

    @rule(everything=st.booleans(), which=st.integers(0, 20))
    def abort(self, everything: bool, which: int) -> None:
        jobs = self.requests._jobs()
        rids = [jobs[which % len(jobs)].spec.rid] if jobs else []
        self.requests.abort(rids, everything, "aborted by the caller")

    # ---- what always holds -------------------------------------------------------------------------------------------

    @property
    def alive(self) -> list[Engine]:
        return [engine for engine in self.engines if not engine.dead]

    @invariant()
    def every_request_is_in_one_place_or_has_ended(self) -> None:
        waiting, running = list(self.requests._queue), self.requests._running
        places = waiting + [job for jobs in running.values() for job in jobs]
        assert len(set(map(id, places))) == len(places)
        for call, _ in self.calls:
            if not call.over:
                lost = [job for job in call.jobs if not job.complete and job not in places]
                assert lost == []

    @invariant()
    def requests_run_where_the_pool_has_put_them_to_serve(self) -> None:
        states = {number: replica.state for number, replica in self.pool.replicas.items()}
        for number in self.requests._running:
            assert states.get(number) in (State.SERVING, State.RETIRING), number
        for number, load in self.requests.loads.items():
            assert load == sum(job.load for job in self.requests._running[number])

    @precondition(lambda self: not self.events)
    @invariant()
    def whoever_holds_the_served_version_serves_and_nobody_else(self) -> None:
        staying = {n for n, r in self.pool.replicas.items() if r.state is not State.RETIRING}
        assert self.requests.loads.keys() & staying == self.fleet.serving & staying

    @precondition(lambda self: not self.events)
    @invariant()
    def nothing_is_given_to_one_that_has_said_that_its_weights_are_torn(self) -> None:
        serving = [n for n, r in self.pool.replicas.items() if r.state is State.SERVING]
        assert self.fleet.lost is not None or not any(self.engine_of(n).torn for n in serving)

    @precondition(lambda self: not self.events)
    @invariant()
    def the_fleet_knows_no_replica_that_is_gone(self) -> None:
        assert self.fleet.holds.keys() <= self.pool.replicas.keys()

    @precondition(lambda self: self.fleet.lost is None and not self.events)
    @invariant()
    def nothing_waits_beside_an_idle_replica(self) -> None:
        free = self.requests.loads.keys() - self.requests._retired
        assert not self.requests._queue or all(self.requests.loads[n] for n in free)

    @invariant()
    def nobody_gets_a_sample_twice(self) -> None:
        for _, seen in self.calls:
            ends = [update.index for update in seen if update.finish_reason is not None]
            assert len(ends) == len(set(ends))

    @invariant()
    def slots_are_held_once(self) -> None:
        slots = [r.slot for r in self.pool.replicas.values()]
        slots += [*self.pool._starting, *self.pool._due]
        assert len(slots) == len(set(slots))

    def teardown(self) -> None:
        try:
            self.when_all_goes_well_everything_ends()
        finally:
            self._undo()

    def when_all_goes_well_everything_ends(self) -> None:
        self.fleet.lost = None
        self.pool.reconcile()
        order = random.Random(len(self.events))
        for _ in range(2000):
            todo: list[Callable[[], None]] = []
            todo += [lambda: self.background.pop(0)()] if self.background else []
            todo += [lambda: self.events.pop(0)()] if self.events else []
            todo += [lambda: self.fleet.answer(0, None)] if self.fleet.asked else []
            todo += [lambda e=e: e.work(0) for e in self.engines if e.prompts]  # type: ignore[misc]
            if not todo:
                self.time_passes()  # Deaths are found by asking, twice: an answer is looked at the next time.
                if not (self.background or self.events or self.fleet.asked):
                    self.pool.tick(time.monotonic() + 6000.0)
                if not (self.background or self.events or self.fleet.asked):
                    break
                continue
            order.choice(todo)()
        else:
            raise AssertionError("it never comes to rest")
        assert all(call.over for call, _ in self.calls)
        for call, seen in self.calls:
            if call.future.exception() is None:
                ends = sum(update.finish_reason is not None for update in seen)
                assert ends == sum(job.num_samples for job in call.jobs)
        for number, replica in self.pool.replicas.items():
            assert replica.state is State.SERVING and number in self.fleet.serving
        assert all(came.done() for came in self.came)
        if not self.some_start_failed and not self.num_retired:
            assert len(self.pool.replicas) == len(self.came)
        known = {id(replica.executor) for replica in self.pool.replicas.values()}
        assert all(engine.killed or id(engine) in known for engine in self.engines)


def finished(sample: int) -> SampleUpdate:
    return SampleUpdate(
        index=sample,
        rid="",
        output_ids=[7],
        finish_reason=FinishReason(type="length", length=1),
        prompt_tokens=3,
        cached_tokens=0,
        weight_version="0",
        weight_version_number=0,
        weight_versions=[Span("0", 0, 1, 0)],
    )


Pool.TestCase.settings = settings(
    max_examples=150, stateful_step_count=50, deadline=None, print_blob=True, derandomize=True
)
TestPool = Pool.TestCase
