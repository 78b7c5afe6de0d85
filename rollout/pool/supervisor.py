"""Keeps a pool's replicas alive: starts them, asks whether they are well, replaces the dead.

One thread decides; starts, which take seconds, have threads of their own. A replica gets requests only while the fleet
says that it holds the served version.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

from weight_sync.errors import EngineDiedError, TornWeightsError

from ..errors import NoUpdateYetError
from ..protocol.commands import GetStatus, PauseGeneration
from .config import PoolConfig
from .dispatcher import Dispatcher
from .fleet import FleetWeights
from .members import GONE, Member
from .replica import Replica, ReplicaExecutor

logger = logging.getLogger(__name__)

MakeExecutor = Callable[[int], ReplicaExecutor]
"""Starts an engine for a slot: slots are numbered from 0 and used again, as bundles of a placement group are."""

_LONGEST_BACKOFF_S = 30.0


class Supervisor:
    """Owns the replicas. Public methods may be called from any thread."""

    def __init__(
        self,
        config: PoolConfig,
        *,
        make_executor: MakeExecutor,
        make_replica: Callable[[int, ReplicaExecutor], Replica],
        dispatcher: Dispatcher,
        post: Callable[[Callable[[], None]], None],
        fleet: FleetWeights,
    ) -> None:
        """`post(action)` runs an action on the dispatcher's thread."""
        self._config = config
        self._make_executor = make_executor
        self._make_replica = make_replica
        self._dispatcher = dispatcher
        self._post = post
        self._fleet = fleet
        self.replicas: dict[int, Replica] = {}
        """Those that are connected, by number; replaced as a whole."""
        self._slots: dict[int, int] = {}
        self._joined: set[int] = set()
        self._retiring: set[int] = set()
        self._starting: dict[int, Future[int]] = {}
        self._waiters: dict[int, Future[int]] = {}
        self._due: list[tuple[float, int]] = []
        self._bringing_up: set[int] = set()
        self._tried: dict[int, int] = {}
        self._checks: dict[int, Future[Any]] = {}
        self._num_failures = 0
        self._num_started = 0
        self._last_error: Exception | None = None
        self._pause: tuple[PauseGeneration, float] | None = None
        self._closed = False
        self._events: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="pool-supervisor", daemon=True)
        self._thread.start()

    # ---- any thread --------------------------------------------------------------------------------------------------

    def start(self) -> Future[int]:
        """Start one more replica; the future has its number once it serves, or why it does not."""
        future: Future[int] = Future()
        self._events.put(lambda: self._start(self._free_slot(), future))
        return future

    def lost(self, number: int, error: Exception) -> None:
        """A replica died, or must not be used any more."""
        self._events.put(lambda: self._lose(number, error))

    def changed(self) -> None:
        """The fleet knows something new about who serves."""
        self._events.put(self._reconcile)

    def note_pause(self, pause: PauseGeneration | None) -> None:
        """Generation was paused (None: goes on): replicas that come later must be, too."""
        self._pause = None if pause is None else (pause, time.monotonic() + pause.lease_s)

    def retire(self, number: int, drained: Callable[[], bool], timeout_s: float) -> None:
        """Take a replica out: it gets nothing new, and ends when `drained()`, at the latest after `timeout_s`."""
        self._retiring.add(number)
        self._post(lambda: self._dispatcher.retire(number))
        end = time.monotonic() + timeout_s
        while not drained() and time.monotonic() < end:
            time.sleep(0.02)
        gone: Future[Replica | None] = Future()
        why = EngineDiedError(f"replica {number} was removed")
        self._events.put(lambda: gone.set_result(self._forget(number, why)))
        replica = gone.result(30.0)
        if replica is not None:
            replica.executor.close()

    def close(self) -> None:
        """End all replicas, in parallel. Safe to repeat."""
        if self._closed:
            return
        self._closed = True
        self._events.put(lambda: None)
        self._thread.join(timeout=30.0)
        while not self._events.empty():
            self._events.get()()
        closing = [
            threading.Thread(target=replica.executor.close, daemon=True)
            for replica in self.replicas.values()
        ]
        for thread in closing:
            thread.start()
        for thread in closing:
            thread.join(timeout=30.0)
        for future in (*self._starting.values(), *self._waiters.values()):
            if not future.done():
                future.set_exception(EngineDiedError("the pool was shut down"))

    # ---- the thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        next_check = time.monotonic() + self._config.health_interval_s
        while not self._closed:
            soonest = min([next_check, *(when for when, _ in self._due)])
            try:
                self._events.get(timeout=max(0.0, soonest - time.monotonic()))()
            except queue.Empty:
                pass
            except Exception:  # One event must not end the supervision of all replicas.
                logger.exception("the pool's supervisor failed at an event")
            now = time.monotonic()
            for when, slot in [due for due in self._due if due[0] <= now]:
                self._due.remove((when, slot))
                self._start(slot, Future())
            if now >= next_check:
                next_check = now + self._config.health_interval_s
                self._check_health()

    def _free_slot(self) -> int:
        taken = {*self._slots.values(), *self._starting, *(slot for _, slot in self._due)}
        return next(slot for slot in range(len(taken) + 1) if slot not in taken)

    def _start(self, slot: int, future: Future[int]) -> None:
        self._starting[slot] = future

        def run() -> None:
            try:
                executor = self._make_executor(slot)
            except Exception as error:
                failure = error
                self._events.put(lambda: self._start_failed(slot, failure))
            else:
                if self._closed:  # Nobody waits for it any more.
                    executor.kill()
                else:
                    self._events.put(lambda: self._started(slot, executor))

        threading.Thread(target=run, name=f"pool-start-{slot}", daemon=True).start()

    def _started(self, slot: int, executor: ReplicaExecutor) -> None:
        if self._closed:
            executor.kill()
            return
        number = self._num_started
        self._num_started += 1
        self._waiters[number] = self._starting.pop(slot)
        self._num_failures = 0
        replica = self._make_replica(number, executor)
        self.replicas = {**self.replicas, number: replica}
        self._slots[number] = slot
        member = Member(
            number=number,
            channel=executor.weight_channel(),
            ask=executor.submit,
        )
        self._watch_bring_up(number, self._fleet.add(member))

    def _start_failed(self, slot: int, error: Exception) -> None:
        future = self._starting.pop(slot)
        self._last_error = error
        self._num_failures += 1
        logger.warning("a replica did not start (%d in a row): %s", self._num_failures, error)
        if not future.done():
            future.set_exception(error)
        if self._num_started and self._num_failures < self._config.max_start_failures:
            backoff = min(2.0**self._num_failures, _LONGEST_BACKOFF_S)
            self._due.append((time.monotonic() + backoff, slot))
        self._look_for_the_end()

    def _watch_bring_up(self, number: int, done: Future[None]) -> None:
        self._bringing_up.add(number)

        def note() -> None:
            self._bringing_up.discard(number)
            error = done.exception()
            if error is not None:
                self._tried[number] = self._fleet.served.version
            waiter = self._waiters.pop(number, None)
            if waiter is not None and not waiter.done():
                if error is not None:
                    waiter.set_exception(error)
                else:
                    self._reconcile()
                    self._post(lambda: waiter.set_result(number))
            self._reconcile()

        done.add_done_callback(lambda _: self._events.put(note))

    def _reconcile(self) -> None:
        """Give requests to exactly those replicas that hold the served version."""
        serving, lost = self._fleet.serving & set(self.replicas), self._fleet.lost
        for number in sorted(serving - self._joined - self._retiring):
            self._join(self.replicas[number])
        for number, error in list(self._fleet.behind.items()):
            if number in self._joined:
                self._joined.discard(number)
                self._post(partial(self._dispatcher.leave, number, error))
            if number in self.replicas and number not in self._bringing_up and lost is None:
                self._handle_behind(number, error)
        self._post(lambda: self._dispatcher.refuse(no_weights(self._fleet.lost)))
        self._look_for_the_end()

    def _join(self, replica: Replica) -> None:
        self._joined.add(replica.number)
        if self._pause is not None:
            pause, ends = self._pause
            left_s = ends - time.monotonic()
            if left_s > 0:
                replica.executor.submit(
                    PauseGeneration(mode=pause.mode, lease_s=left_s), timeout_s=left_s
                )
        self._post(lambda: self._dispatcher.join(replica))

    def _handle_behind(self, number: int, error: Exception) -> None:
        if isinstance(error, GONE):
            self._lose(number, error)
        elif self._tried.get(number) != self._fleet.served.version:
            self._watch_bring_up(number, self._fleet.bring_up(number))
        elif self._joined:  # It cannot be repaired, and is not needed for anything.
            self._lose(number, error)

    def _lose(self, number: int, error: Exception) -> None:
        slot = self._slots.get(number)
        replica = self._forget(number, error)
        if replica is None or slot is None:
            return
        logger.warning("replica %d is lost: %s", number, error)
        self._last_error = error
        threading.Thread(target=replica.executor.kill, daemon=True).start()
        if self._config.replace_dead and not self._closed:
            self._start(slot, Future())
        self._look_for_the_end()

    def _forget(self, number: int, error: Exception) -> Replica | None:
        replica = self.replicas.get(number)
        self.replicas = {n: r for n, r in self.replicas.items() if n != number}
        for table in (self._slots, self._tried, self._checks):
            table.pop(number, None)
        self._joined.discard(number)
        self._retiring.discard(number)
        self._fleet.remove(number)
        self._post(lambda: self._dispatcher.leave(number, error))
        return replica

    def _look_for_the_end(self) -> None:
        """Tell those who wait, when nothing that is under way can help them."""
        if self._joined or self._starting or self._due or self._bringing_up or self._closed:
            return
        error: Exception
        if self.replicas:
            error = TornWeightsError(
                f"cannot generate: no replica of the pool holds version {self._fleet.served.version}; publish a "
                "complete update"
            )
        else:
            error = EngineDiedError(
                f"no replica of the pool is left (the last error: {self._last_error}); make a new pool"
            )
        self._post(lambda: self._dispatcher.block(error))

    def _check_health(self) -> None:
        for number, replica in self.replicas.items():
            check = self._checks.get(number)
            if check is not None and not check.done():
                continue
            error = check.exception() if check is not None else None
            if isinstance(error, Exception):
                self._lose(number, _unwell(number, error))
                continue
            self._checks[number] = replica.executor.submit(
                GetStatus(), timeout_s=self._config.health_timeout_s
            )


def no_weights(lost: str | None) -> TornWeightsError | None:
    """Why a pool that gave its weights back does not generate; None: it has not."""
    if lost is None:
        return None
    return NoUpdateYetError.found(lost) or TornWeightsError(
        f"cannot generate: {lost}; resume it and publish a complete update first"
    )


def _unwell(number: int, error: Exception) -> Exception:
    if isinstance(error, GONE):
        return error
    return EngineDiedError(f"replica {number} did not answer and was ended: {error}")
