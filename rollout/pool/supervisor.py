"""Keeps a pool's replicas alive: starts them, asks whether they are well, does what `states.decide` says about them.

A place of the pool is being started, waits for its next start, or has a replica. What a replica holds the fleet knows,
which has asked it; it gets requests only while the fleet says that it holds the served version. Everything here runs on
the pool's thread and returns at once; starts have their own threads.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from weight_sync.errors import EngineDiedError, TornWeightsError
from weight_sync.wire.futures import answer, fail

from ..errors import NoUpdateYetError
from ..protocol.commands import GetStatus, ResumeMemory
from .config import PoolConfig
from .dispatcher import Dispatcher
from .fleet import GONE, FleetWeights, Known, ReplicaMember
from .orders import StandingOrders
from .replica import Post, Replica, ReplicaExecutor, answers_of, when_all_have_answered
from .states import Facts, State, Todo, decide

logger = logging.getLogger(__name__)

MakeExecutor = Callable[[int], ReplicaExecutor]
"""Starts an engine for a slot: slots are numbered from 0 and used again, as bundles of a placement group are."""

_LONGEST_BACKOFF_S = 30.0


@dataclass(eq=False, slots=True, kw_only=True)
class Start:
    """A replica that is not there yet."""

    slot: int
    """Its place in the pool."""
    came: Future[int]
    """As `Replica.came`."""
    due: float | None = None
    """When it is tried again, on the monotonic clock; None: it is under way."""


class Supervisor:
    """Owns the replicas. Used by the pool's thread alone."""

    def __init__(
        self,
        config: PoolConfig,
        *,
        make_executor: MakeExecutor,
        dispatcher: Dispatcher,
        fleet: FleetWeights,
        post: Post,
    ) -> None:
        self._config = config
        self._make_executor = make_executor
        self._dispatcher = dispatcher
        self._fleet = fleet
        self._post = post
        self.orders = StandingOrders()
        self.releasing: str | None = None
        """Why weights are about to go; None: they are not."""
        self._places: dict[int, Start | Replica] = {}  # by slot
        self._num_started = 0
        self._num_failures = 0
        self._last_error: Exception | None = None
        self._next_check = time.monotonic() + config.health_interval_s
        self._closed = False
        fleet.watch(lambda: post(self.reconcile))

    @property
    def replicas(self) -> dict[int, Replica]:
        """Those that are connected, by number."""
        there = [place for place in self._places.values() if isinstance(place, Replica)]
        return {replica.number: replica for replica in sorted(there, key=lambda r: r.number)}

    # ---- what a caller asks for --------------------------------------------------------------------------------------

    def start(self, came: Future[int]) -> None:
        """Start one more replica; `came` has its number once it serves, or why it does not."""
        free = (slot for slot in range(len(self._places) + 1) if slot not in self._places)
        self._start(Start(slot=next(free), came=came))

    def others_serve(self, number: int) -> bool:
        """Whether the pool goes on without this replica."""
        return any(r.state is State.SERVING for r in self.replicas.values() if r.number != number)

    def retire(self, number: int, end: float, done: Future[int]) -> None:
        """Take a replica out: it gets nothing new, and ends when it has finished, at the latest at `end`."""
        self.replicas[number].leaving = end, done
        self.reconcile()

    def note(self, command: Any) -> None:
        """The pool was asked for it: replicas that come later are, too."""
        self.orders.note(command)
        if isinstance(command, ResumeMemory):
            for replica in self.replicas.values():
                replica.tried = None  # It may have been for lack of memory.

    def close(self) -> list[Replica]:
        """Start nothing any more; returns the replicas, to be ended."""
        self._closed = True
        error = EngineDiedError("the pool was shut down")
        replicas = list(self.replicas.values())
        leaving = [replica.leaving[1] for replica in replicas if replica.leaving is not None]
        for future in (*(place.came for place in self._places.values()), *leaving):
            fail(future, error)
        return replicas

    # ---- what happens ------------------------------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """Do what the clock asks for; called several times a second."""
        starts = [place for place in self._places.values() if isinstance(place, Start)]
        for place in starts:
            if place.due is not None and place.due <= now and not self._closed:
                self._start(Start(slot=place.slot, came=Future()))
        if now >= self._next_check:
            self._next_check = now + self._config.health_interval_s
            for replica in self.replicas.values():
                self._check(replica)
        self.reconcile(now)

    def reconcile(self, now: float | None = None) -> None:
        """Do about every replica what follows from what is true now."""
        now = time.monotonic() if now is None else now
        known, replicas = self._fleet.known(), self.replicas
        for number, replica in replicas.items():
            if isinstance(error := known.behind.get(number), GONE):
                replica.dead = replica.dead or error
        decisions = decide(
            {number: self._facts(r, known, now) for number, r in replicas.items()},
            memory_is_gone=known.lost is not None or self.orders.weights_are_released,
        )
        for number, (state, todo) in decisions.items():
            self._carry_out(replicas[number], state, todo, known)
        self._dispatcher.refuse(no_weights(self.releasing or known.lost))
        self._look_for_the_end(known.served.version)

    def _facts(self, replica: Replica, known: Known, now: float) -> Facts:
        leaving = replica.leaving
        return Facts(
            dead=replica.dead is not None,
            leaving=leaving is not None,
            finished=not self._dispatcher.loads.get(replica.number),
            late=leaving is not None and now >= leaving[0],
            holds=replica.number in known.serving,
            denied=replica.denied is not None,
            asked=replica.asked,
            tried=replica.tried == known.served.version and now < replica.again,
        )

    def _carry_out(self, replica: Replica, state: State, todo: Todo, known: Known) -> None:
        number = replica.number
        error = replica.dead or replica.denied or known.behind.get(number)
        error = error or EngineDiedError(f"replica {number} was removed")
        replica.state = state
        if state is State.SERVING:
            replica.tried, replica.num_failures, replica.has_served = None, 0, True
            self._dispatcher.join(replica)
            answer(replica.came, number)
        elif state is not State.RETIRING:
            self._dispatcher.leave(number, error)
        if todo is Todo.ASK:
            replica.denied = None
            self._ask(replica, self._fleet.bring_up(number))
        elif todo is not Todo.NOTHING:
            self._remove(replica, error)
            if todo is Todo.REPLACE and self._config.replace_dead and not self._closed:
                self._replace(replica)

    # ---- starts ------------------------------------------------------------------------------------------------------

    def _start(self, start: Start) -> None:
        self._places[start.slot] = start

        def run() -> None:
            try:
                executor = self._make_executor(start.slot)
            except Exception as error:
                failure = error
                self._post(lambda: self._start_failed(start, failure))
            else:
                if self._closed:  # Nobody waits for it any more.
                    executor.kill()
                else:
                    self._post(lambda: self._started(start, executor))

        _in_background(run)

    def _replace(self, replica: Replica) -> None:
        """Not at once when it has come in vain: whatever it lacked, the next one would lack now."""
        start = Start(slot=replica.slot, came=Future())
        if replica.has_served:
            self._start(start)
        else:
            start.due = time.monotonic() + _backoff_s(2)
            self._places[replica.slot] = start

    def _start_failed(self, start: Start, error: Exception) -> None:
        fail(start.came, error)
        self._last_error = error
        self._num_failures += 1
        logger.warning("a replica did not start (%d in a row): %s", self._num_failures, error)
        if self._num_started and self._num_failures < self._config.max_start_failures:
            start.due = time.monotonic() + _backoff_s(self._num_failures)
        else:
            del self._places[start.slot]
        self.reconcile()

    def _started(self, start: Start, executor: ReplicaExecutor) -> None:
        if self._closed:
            executor.kill()
            return
        self._num_failures = 0
        replica = Replica(
            number=self._num_started,
            slot=start.slot,
            executor=executor,
            dispatcher=self._dispatcher,
            post=self._post,
            changed=self.reconcile,
            came=start.came,
        )
        self._num_started += 1
        self._places[start.slot] = replica
        # What was asked of the pool before; what comes later it is told as the others are.
        limit = self._config.health_timeout_s
        for command in self.orders.limits:
            executor.submit(command, timeout_s=limit)
        told = [executor.submit(command, timeout_s=limit) for command in self.orders.conditions]
        when_all_have_answered(told, self._post, lambda: self._told(replica, told))

    def _told(self, replica: Replica, told: list[Future[Any]]) -> None:
        if replica.state is State.GONE:
            return
        try:
            if told:
                answers_of(told)
        except Exception as error:
            replica.dead = error
            self.reconcile()
            return
        member = ReplicaMember(
            name=f"replica {replica.number}",
            number=replica.number,
            channel=replica.executor.weight_channel(),
            ask=replica.executor.submit,
        )
        self._ask(replica, self._fleet.add(member))

    # ---- replicas ----------------------------------------------------------------------------------------------------

    def _ask(self, replica: Replica, done: Future[None]) -> None:
        """The fleet asks it what it holds, and brings it to the served version."""
        replica.asked = True
        version = self._fleet.served.version

        def note() -> None:
            replica.asked = False
            error = done.exception()
            if error is not None:
                replica.tried = version
                replica.num_failures += 1
                replica.again = time.monotonic() + _backoff_s(replica.num_failures)
                fail(replica.came, error)
            self.reconcile()

        done.add_done_callback(lambda _: self._post(note))

    def _remove(self, replica: Replica, error: Exception) -> None:
        del self._places[replica.slot]
        self._fleet.remove(replica.number)
        fail(replica.came, error)
        if self._closed:  # Whoever closes the pool ends them all.
            return
        end, (_, done) = replica.executor.close, replica.leaving or (0.0, Future())
        if replica.leaving is None or replica.dead is not None:
            logger.warning("replica %d is lost: %s", replica.number, error)
            self._last_error = error
            end = replica.executor.kill
        _in_background(_end, end, done, replica.number)

    def _check(self, replica: Replica) -> None:
        if replica.check is not None:
            if not replica.check.done():
                return
            if isinstance(error := replica.check.exception(), Exception):
                dead = f"replica {replica.number} did not answer and was ended: {error}"
                replica.dead = error if isinstance(error, GONE) else EngineDiedError(dead)
                return
        limit = self._config.health_timeout_s
        replica.check = replica.executor.submit(GetStatus(), timeout_s=limit)

    def _look_for_the_end(self, version: int) -> None:
        """Tell those who wait, when nothing that is under way can help them."""
        replicas = self.replicas.values()
        is_starting = len(replicas) < len(self._places)
        states = {replica.state for replica in replicas}
        if is_starting or self._closed or states & {State.SERVING, State.COMING}:
            return
        error: Exception = EngineDiedError(
            f"no replica of the pool is left (the last error: {self._last_error}); make a new pool"
        )
        if replicas:
            error = TornWeightsError(
                f"cannot generate: no replica of the pool holds version {version}; publish a complete update"
            )
        self._dispatcher.block(error)


def no_weights(lost: str | None) -> TornWeightsError | None:
    """Why a pool that gave its weights back does not generate; None: it has not."""
    if lost is None:
        return None
    return NoUpdateYetError.found(lost) or TornWeightsError(
        f"cannot generate: {lost}; resume it and publish a complete update first"
    )


def _backoff_s(num_failures: int) -> float:
    """How long after so many failures in a row it is tried again."""
    return min(2.0 ** min(num_failures, 9), _LONGEST_BACKOFF_S)


def _end(close: Callable[[], None], done: Future[int], number: int) -> None:
    close()
    answer(done, number)


def _in_background(function: Callable[..., None], *args: Any) -> None:
    threading.Thread(target=function, args=args, name="pool-work", daemon=True).start()
