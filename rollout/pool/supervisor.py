"""Keeps a pool's replicas alive: starts them, asks whether they are well, replaces the dead.

    start --> COMING --brought up--> SERVING <--holds the version again-- BEHIND, COMING
              COMING --cannot be--> BEHIND --another version; nobody serves, after a while--> COMING
              SERVING --does not hold the version--> BEHIND
              SERVING --retire--> RETIRING --has finished, and is not the last that holds the version--> GONE
              any --dies, hangs, cannot be repaired while others serve--> GONE, and another one starts in its slot

Who cannot be repaired is tried again while nobody serves, instead of being replaced: another one would come from where
it did, and meanwhile this one is there for the next complete update. What a replica holds the fleet knows, which has
asked it; a replica gets requests only while the fleet says that it holds the served version. Everything here runs on
the pool's thread and returns at once; starts have their own threads.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from typing import Any

import msgspec

from weight_sync.errors import EngineDiedError, TornWeightsError

from ..errors import NoUpdateYetError
from ..protocol.commands import (
    GetStatus,
    MemoryTag,
    PauseGeneration,
    ReleaseMemory,
    ResumeMemory,
    SetLimits,
    SlowDown,
)
from .config import PoolConfig
from .dispatcher import Dispatcher
from .fleet import GONE, FleetWeights, ReplicaMember
from .replica import Post, Replica, ReplicaExecutor, State, answers_of, when_all_have_answered

logger = logging.getLogger(__name__)

MakeExecutor = Callable[[int], ReplicaExecutor]
"""Starts an engine for a slot: slots are numbered from 0 and used again, as bundles of a placement group are."""

_LONGEST_BACKOFF_S = 30.0


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
        self.replicas: dict[int, Replica] = {}
        """Those that are connected, by number."""
        self.releasing: str | None = None
        """Why weights are about to go; None: they are not."""
        self._starting: dict[int, Future[int]] = {}  # by slot
        self._due: dict[int, float] = {}  # slot -> when it is started again
        self._retirements: dict[int, tuple[float, Future[int]]] = {}
        self._pause: tuple[PauseGeneration, float] | None = None
        self._released: set[MemoryTag] = set()
        self._keeps = False  # The released weights come back as they were.
        self._tuned: dict[str, SlowDown | SetLimits] = {}
        self._num_started = 0
        self._num_failures = 0
        self._last_error: Exception | None = None
        self._next_check = time.monotonic() + config.health_interval_s
        self._closed = False

    # ---- what a caller asks for --------------------------------------------------------------------------------------

    def start(self, came: Future[int]) -> None:
        """Start one more replica; `came` has its number once it serves, or why it does not."""
        taken = {*(r.slot for r in self.replicas.values()), *self._starting, *self._due}
        self._start(next(slot for slot in range(len(taken) + 1) if slot not in taken), came)

    def retire(self, number: int, end: float, done: Future[int]) -> None:
        """Take a replica out: it gets nothing new, and ends when it has finished, at the latest at `end`."""
        replica = self.replicas[number]
        replica.state = State.RETIRING
        self._dispatcher.retire(number)
        self._retirements[number] = end, done

    def note(self, command: Any) -> None:
        """The pool was asked for it: replicas that come later are, too."""
        if isinstance(command, PauseGeneration):
            self._pause = command, time.monotonic() + command.lease_s
        elif isinstance(command, ReleaseMemory):
            self._released |= set(command.tags)
            self._keeps |= command.keep_weights
        elif isinstance(command, ResumeMemory):
            self._released -= set(command.tags)
            self._keeps &= "weights" in self._released
            for replica in self.replicas.values():
                replica.tried = replica.again = None
        elif isinstance(command, SlowDown):
            self._tuned["seconds"] = command
        elif isinstance(command, SetLimits):  # One by one: each may be refused alone.
            given = {n: v for n, v in msgspec.structs.asdict(command).items() if v is not None}
            self._tuned |= {name: SetLimits(**{name: value}) for name, value in given.items()}
        else:
            self._pause = None

    def close(self) -> list[Replica]:
        """Start nothing any more; returns the replicas, to be ended."""
        self._closed = True
        error = EngineDiedError("the pool was shut down")
        came = [*self._starting.values(), *(r.came for r in self.replicas.values())]
        for asked in (*came, *(done for _, done in self._retirements.values())):
            _fail(asked, error)
        return list(self.replicas.values())

    # ---- what happens ------------------------------------------------------------------------------------------------

    def tick(self, now: float) -> float:
        """Do what the clock asks for; returns when it does so next."""
        for slot in [slot for slot, when in self._due.items() if when <= now]:
            del self._due[slot]
            self._start(slot, Future())
        for number, (end, done) in list(self._retirements.items()):
            finished = not self._dispatcher.loads.get(number) and not self._is_the_last(number)
            if now >= end or finished:
                del self._retirements[number]
                replica = self._forget(number, EngineDiedError(f"replica {number} was removed"))
                assert replica is not None
                _in_background(_close, replica, done)
        if now >= self._next_check:
            self._next_check = now + self._config.health_interval_s
            for replica in list(self.replicas.values()):
                self._check(replica)
        late = [r for r in self.replicas.values() if r.again is not None and r.again <= now]
        for replica in late:
            replica.tried = replica.again = None
        if late:
            self.reconcile()
        again = [r.again for r in self.replicas.values() if r.again is not None]
        ends = [end for end, _ in self._retirements.values()]
        return min(self._next_check, *self._due.values(), *again, *ends, now + 3600.0)

    def lost(self, number: int, error: Exception) -> None:
        """A replica's answer says that it must not be used: it has died, or its weights are no version."""
        replica = self.replicas.get(number)
        if not isinstance(error, TornWeightsError):
            self._lose(number, error)
        elif replica is not None and replica.state is State.SERVING:
            self._leave(replica, error)
            self._bring_up(replica, self._fleet.bring_up(number))  # It is asked, and repaired.

    def reconcile(self) -> None:
        """The fleet knows something new: give requests to exactly those replicas that hold the served version."""
        fleet = self._fleet
        behind, serving = fleet.behind, fleet.serving
        for number, replica in list(self.replicas.items()):
            if number in serving:
                self._serves(replica)
            elif number in behind:
                self._is_behind(replica, behind[number])
        self._dispatcher.refuse(no_weights(self.releasing or fleet.lost))
        self._look_for_the_end()

    # ---- starts ------------------------------------------------------------------------------------------------------

    def _start(self, slot: int, came: Future[int]) -> None:
        self._starting[slot] = came

        def run() -> None:
            try:
                executor = self._make_executor(slot)
            except Exception as error:
                failure = error
                self._post(lambda: self._start_failed(slot, failure))
            else:
                if self._closed:  # Nobody waits for it any more.
                    executor.kill()
                else:
                    self._post(lambda: self._started(slot, executor))

        _in_background(run)

    def _started(self, slot: int, executor: ReplicaExecutor) -> None:
        if self._closed:
            executor.kill()
            return
        self._num_failures = 0
        replica = Replica(
            number=self._num_started,
            slot=slot,
            executor=executor,
            dispatcher=self._dispatcher,
            post=self._post,
            came=self._starting.pop(slot),
        )
        self._num_started += 1
        self.replicas[replica.number] = replica
        told: list[
            Any
        ] = []  # What was asked of the pool before; what comes later it is told as the others are.
        if self._pause is not None and (left_s := self._pause[1] - time.monotonic()) > 0:
            told.append(msgspec.structs.replace(self._pause[0], lease_s=left_s))
        if self._released:
            released = ReleaseMemory(tags=sorted(self._released), keep_weights=self._keeps)
            told.append(released)
        limit = self._config.health_timeout_s
        for command in self._tuned.values():  # What one replica refuses, all have refused.
            executor.submit(command, timeout_s=limit)
        asked = [executor.submit(command, timeout_s=limit) for command in told]
        when_all_have_answered(asked, self._post, lambda: self._told(replica, asked))

    def _told(self, replica: Replica, asked: list[Future[Any]]) -> None:
        if replica.state is State.GONE:
            return
        try:
            if asked:
                answers_of(asked)
        except Exception as error:
            self._lose(replica.number, error)
            return
        member = ReplicaMember(
            name=f"replica {replica.number}",
            number=replica.number,
            channel=replica.executor.weight_channel(),
            ask=replica.executor.submit,
        )
        self._bring_up(replica, self._fleet.add(member))

    def _start_failed(self, slot: int, error: Exception) -> None:
        _fail(self._starting.pop(slot), error)
        self._last_error = error
        self._num_failures += 1
        logger.warning("a replica did not start (%d in a row): %s", self._num_failures, error)
        if self._num_started and self._num_failures < self._config.max_start_failures:
            self._due[slot] = time.monotonic() + _backoff_s(self._num_failures)
        self._look_for_the_end()

    # ---- transitions -------------------------------------------------------------------------------------------------

    def _bring_up(self, replica: Replica, done: Future[None]) -> None:
        replica.state, replica.again = State.COMING, None
        version = self._fleet.served.version

        def note() -> None:
            error = done.exception()
            if replica.state is State.COMING:  # `reconcile` sees whether it serves, still.
                replica.state = State.BEHIND
                if error is not None:
                    replica.tried = version
                    replica.num_failures += 1
                    replica.again = time.monotonic() + _backoff_s(replica.num_failures)
                    _fail(replica.came, error)
            self.reconcile()

        done.add_done_callback(lambda _: self._post(note))

    def _serves(self, replica: Replica) -> None:
        if replica.state in (State.COMING, State.BEHIND):
            replica.state = State.SERVING
            replica.tried, replica.again, replica.num_failures = None, None, 0
            self._dispatcher.join(replica)
            _answer(replica.came, replica.number)

    def _is_behind(self, replica: Replica, error: Exception) -> None:
        if isinstance(error, GONE):
            self._lose(replica.number, error)
            return
        if replica.state is State.SERVING:
            self._leave(replica, error)
        memory_is_gone = self._fleet.lost is not None or "weights" in self._released
        if replica.state is not State.BEHIND or memory_is_gone:
            return
        if replica.tried != self._fleet.served.version:
            self._bring_up(replica, self._fleet.bring_up(replica.number))
        elif self.others_serve(replica.number):
            self._lose(
                replica.number, error
            )  # It cannot be repaired, and is not needed for anything.

    def others_serve(self, number: int) -> bool:
        """Whether the pool goes on without this replica."""
        return any(
            other.state is State.SERVING
            for other in self.replicas.values()
            if other.number != number
        )

    def _is_the_last(self, number: int) -> bool:
        """Whether the served version would be gone with this replica, while others might still get it."""
        return number in self._fleet.serving and not self.others_serve(number)

    def _leave(self, replica: Replica, error: Exception) -> None:
        replica.state = State.BEHIND
        self._dispatcher.leave(replica.number, error)

    def _lose(self, number: int, error: Exception) -> None:
        was_leaving = number in self._retirements
        replica = self._forget(number, error)
        if replica is None:
            return
        if not self._closed:  # Else all of them end, as they should.
            logger.warning("replica %d is lost: %s", number, error)
        self._last_error = error
        _in_background(replica.executor.kill)
        if self._config.replace_dead and not self._closed and not was_leaving:
            self._start(replica.slot, Future())
        self._look_for_the_end()

    def _forget(self, number: int, error: Exception) -> Replica | None:
        replica = self.replicas.pop(number, None)
        if replica is not None:
            replica.state = State.GONE
            _fail(replica.came, error)
            self._fleet.remove(number)
            self._dispatcher.leave(number, error)
            if number in self._retirements:
                _answer(self._retirements.pop(number)[1], number)
        return replica

    def _check(self, replica: Replica) -> None:
        check = replica.check
        if check is not None and not check.done():
            return
        error = check.exception() if check is not None else None
        if isinstance(error, Exception):
            number = replica.number
            dead = EngineDiedError(f"replica {number} did not answer and was ended: {error}")
            self._lose(number, error if isinstance(error, GONE) else dead)
            return
        limit = self._config.health_timeout_s
        replica.check = replica.executor.submit(GetStatus(), timeout_s=limit)

    def _look_for_the_end(self) -> None:
        """Tell those who wait, when nothing that is under way can help them."""
        states = {replica.state for replica in self.replicas.values()}
        if self._starting or self._due or self._closed or states & {State.SERVING, State.COMING}:
            return
        error: Exception = EngineDiedError(
            f"no replica of the pool is left (the last error: {self._last_error}); make a new pool"
        )
        if self.replicas:
            error = TornWeightsError(
                f"cannot generate: no replica of the pool holds version {self._fleet.served.version}; publish a "
                "complete update"
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


def _fail(future: Future[Any], error: BaseException) -> None:
    with contextlib.suppress(InvalidStateError):  # It has an answer.
        future.set_exception(error)


def _answer(future: Future[int], number: int) -> None:
    with contextlib.suppress(InvalidStateError):
        future.set_result(number)


def _close(replica: Replica, done: Future[int]) -> None:
    replica.executor.close()
    _answer(done, replica.number)


def _in_background(function: Callable[..., None], *args: Any) -> None:
    threading.Thread(target=function, args=args, name="pool-work", daemon=True).start()
