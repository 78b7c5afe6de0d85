"""A pool's decisions under any order of events: starts, deaths, updates that replicas miss, requests and their ends.

No process and no thread: executors and the fleet are stand-ins, and what would run elsewhere runs when the machine says
so. Every request ends, each sample reaches its caller once, and work is only where the served version is.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from pool_stand_ins import Engine, Fleet

from rollout.pool import supervisor as supervision
from rollout.pool.catch_up import ServedVersion
from rollout.pool.config import PoolConfig
from rollout.pool.dispatcher import Dispatcher
from rollout.pool.job import PoolCall
from rollout.pool.routing import Router
from rollout.pool.states import State
from rollout.pool.supervisor import Supervisor
from rollout.protocol.commands import PromptSpec, SampleUpdate
from rollout.sampling_params import SamplingParams
from weight_sync.errors import EngineDiedError, TornWeightsError, WeightUpdateError

POOL = PoolConfig(num_replicas=2, max_start_failures=3, max_reruns=1000)


class Pool(RuleBasedStateMachine):
    """Supervisor and dispatcher, and all that may happen around them."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Callable[[], None]] = []
        self.background: list[Callable[[], None]] = []
        self.now = 1e6
        patch = mock.patch.multiple(
            supervision,
            _in_background=lambda function, *args: self.background.append(lambda: function(*args)),
            time=SimpleNamespace(monotonic=lambda: self.now),
        )
        patch.start()
        self._undo = patch.stop
        self.engines: list[Engine] = []
        self.starts_fail = self.some_start_failed = False
        self.retired: list[Future[int]] = []
        self.fleet: Any = Fleet(self.is_written)
        self.requests = Dispatcher(
            Router(limit=3, affinity_tokens=0, slack=8),
            seed=1,
            max_reruns=POOL.max_reruns,
            served=self.fleet.version_now,
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
        lanes = {n: lane.jobs for n, lane in self.requests._lanes.items()}
        runs = {id(r.executor): lanes.get(n) for n, r in self.pool.replicas.items()}
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
        version = self.fleet.served.version + 1
        self.fleet.served = ServedVersion(version=version, label=str(version), fingerprint=None)
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
        self.fleet._changed()

    @precondition(lambda self: self.may_retire)
    @rule(which=st.integers(0, 9))
    def retire(self, which: int) -> None:
        self.retired.append(Future())
        end = self.now + 4000.0
        self.pool.retire(self.may_retire[which % len(self.may_retire)], end, self.retired[-1])

    @property
    def may_retire(self) -> list[int]:
        """Those without which the pool goes on."""
        replicas = self.pool.replicas
        staying = [number for number, r in replicas.items() if r.state is not State.RETIRING]
        return [number for number in staying if self.pool.others_serve(number)]

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
        self.now += 3000.0
        self.pool.tick(self.now)

    def settle(self) -> None:
        """The pool's thread and what runs in the background come to everything."""
        while self.events or self.background:
            (self.events or self.background).pop(0)()

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
        places = self.requests._jobs()
        assert len(set(map(id, places))) == len(places)
        for call, _ in self.calls:
            if not call.over:
                lost = [job for job in call.jobs if not job.complete and job not in places]
                assert lost == []

    @invariant()
    def requests_run_where_the_pool_has_put_them_to_serve(self) -> None:
        states = {number: replica.state for number, replica in self.pool.replicas.items()}
        for number, lane in self.requests._lanes.items():
            assert states.get(number) in (State.SERVING, State.RETIRING), number
            assert lane.load == sum(job.load for job in lane.jobs)

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
        free = [lane for lane in self.requests._lanes.values() if lane.target.takes_more]
        assert not self.requests._queue or all(lane.load for lane in free)

    @invariant()
    def nobody_gets_a_sample_twice(self) -> None:
        for _, seen in self.calls:
            ends = [update.index for update in seen if update.finish_reason is not None]
            assert len(ends) == len(set(ends))

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
                    self.time_passes()
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
        assert all(future.done() for future in (*self.came, *self.retired))
        if not self.some_start_failed:
            assert len(self.pool.replicas) == len(self.came) - len(self.retired)
        known = {id(replica.executor) for replica in self.pool.replicas.values()}
        assert all(engine.killed or id(engine) in known for engine in self.engines)


Pool.TestCase.settings = settings(
    max_examples=150, stateful_step_count=50, deadline=None, print_blob=True, derandomize=True
)
TestPool = Pool.TestCase


@pytest.fixture
def pool() -> Iterator[Pool]:
    """Two replicas that serve; the first is leaving, and the second could not be given the last version."""
    pool = Pool()
    first, second = sorted(pool.pool.replicas)
    pool.ask(2, 1)
    pool.retired.append(Future())
    pool.pool.retire(first, pool.now + 7000.0, pool.retired[-1])
    pool.publish({second})
    pool.settle()
    pool.fleet.answer(0, WeightUpdateError("no room for weights"))
    pool.engine_of(first).work(0)
    pool.settle()
    yield pool
    if pool.pool._closed:  # Whoever closes a pool ends its replicas.
        pool._undo()
    else:
        pool.teardown()


def test_the_last_that_holds_the_version_stays_until_another_has_been_given_it(pool: Pool) -> None:
    first, second = sorted(pool.pool.replicas)
    pool.time_passes()
    pool.settle()
    assert [r.state for r in pool.pool.replicas.values()] == [State.RETIRING, State.COMING]
    pool.fleet.answer(0, None)
    pool.settle()
    pool.time_passes()
    pool.settle()
    assert list(pool.pool.replicas) == [second] and pool.retired[0].result(0) == first


def test_the_last_that_holds_the_version_goes_when_its_time_is_up(pool: Pool) -> None:
    first, second = sorted(pool.pool.replicas)
    for _ in range(3):
        pool.time_passes()
    pool.settle()
    assert list(pool.pool.replicas) == [second] and pool.retired[0].result(0) == first
    # Nobody has the version, and it is asked for again and again, ever more rarely.
    for num in range(2, 6):
        pool.fleet.answer(0, WeightUpdateError("no room for weights"))
        pool.settle()
        assert pool.pool.replicas[second].num_failures == num and not pool.fleet.asked
        pool.time_passes()
        pool.settle()


def test_who_dies_while_it_is_leaving_is_not_replaced(pool: Pool) -> None:
    first, second = sorted(pool.pool.replicas)
    pool.engine_of(first).die()
    for _ in range(2):  # An answer is looked at the next time.
        pool.time_passes()
        pool.settle()
    assert list(pool.pool.replicas) == [second] and pool.retired[0].result(0) == first
    assert len(pool.engines) == 2


def test_a_shutdown_answers_who_waits_for_a_replica_to_leave(pool: Pool) -> None:
    pool.pool.close()
    assert isinstance(pool.retired[0].exception(0), EngineDiedError)


def test_one_that_never_served_is_replaced_after_a_while(pool: Pool) -> None:
    second = max(pool.pool.replicas)
    pool.fleet.say(second, None)  # An update has reached it.
    pool.one_more()
    pool.settle()
    for num in range(4, 8):
        assert len(pool.engines) == num - 1 and len(pool.fleet.asked) == 1
        pool.fleet.answer(0, WeightUpdateError("no room for weights"))
        pool.settle()
        assert pool.engines[-1].killed and len(pool.engines) == num - 1
        pool.time_passes()
        pool.settle()
