"""The executor of a pool: commands of one engine's surface, carried out by many engines.

Prompts go to one replica each, weight messages to all through the fleet, and whatever else there is to all, with the
answers added up. One thread, the pool's, decides everything but updates, which wait for replicas and have their own.
"""

from __future__ import annotations

import logging
import os
import queue
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar, get_args

import msgspec
import numpy as np

from weight_sync.joint.service import JointChannel
from weight_sync.time_left import left_s
from weight_sync.wire.channel import Channel
from weight_sync.wire.futures import resolve, wait
from weight_sync.wire.messages import WeightRequest
from weight_sync.wire.rpc import Call, RpcServer

from ..config import EngineConfig, default_block_size
from ..engine.executors.executor import OnChunk
from ..errors import EngineClosedError, InvalidRequestError, NoUpdateYetError, RolloutError
from ..protocol import commands as cmd
from ..protocol.wire import REQUEST_TYPES, check_sendable
from .catch_up import ServedVersion
from .config import PoolConfig
from .dispatcher import Dispatcher
from .fleet import FleetWeights
from .job import PoolCall
from .orders import StandingOrders
from .replica import Replica, ReplicaStatus, answers_of, when_all_have_answered
from .routing import Router
from .states import State
from .supervisor import MakeExecutor, Supervisor

logger = logging.getLogger(__name__)
T = TypeVar("T")

_TICK_S = 0.25
"""How often, at least, the pool looks at the clock."""
WEIGHT_MESSAGES = get_args(WeightRequest)
ABORTED = "generation was paused (mode abort); resubmit prompt plus partial output"


class PoolExecutor:
    """Many engines as one; see `Executor` for the methods."""

    def __init__(
        self,
        config: EngineConfig,
        pool: PoolConfig,
        make_executor: MakeExecutor,
        *,
        group_host: str = "127.0.0.1",
        socket_folder: str | None = None,
    ) -> None:
        """Returns when all replicas serve; raises the first error of a start, and leaves nothing behind.

        socket_folder: for a socket file of the pool, which removes the folder at its end; None: a private one.
        """
        self._config = config
        self._socket_folder = socket_folder
        self._server: RpcServer | None = None
        self._lock = threading.Lock()
        self._closed = False
        self._events: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._fleet = fleet = FleetWeights(
            label=config.weight_version if config.weight_version is not None else "0",
            timeout_s=config.request_timeout_s,
            group_host=group_host,
            awaits=NoUpdateYetError.STATE if config.awaits_first_update else None,
        )
        self._dispatcher = Dispatcher(
            Router(
                limit=pool.max_inflight_samples or max(1, config.max_running_requests * 5 // 4),
                affinity_tokens=pool.affinity_blocks
                * (
                    config.block_size or default_block_size(config.device, config.attention_backend)
                ),
                slack=pool.affinity_slack,
            ),
            seed=secrets.randbits(63) if config.seed is None else config.seed,
            max_reruns=pool.max_reruns,
            served=fleet.version_now,
        )
        self._supervisor = Supervisor(
            pool,
            make_executor=make_executor,
            dispatcher=self._dispatcher,
            fleet=fleet,
            post=self._events.put,
        )
        self._tick_s = min(_TICK_S, pool.health_interval_s)
        self._thread = threading.Thread(target=self._run, name="pool", daemon=True)
        self._thread.start()
        try:
            for came in [self._start() for _ in range(pool.num_replicas)]:
                self._await_start(came)
        except BaseException:
            self.close()
            raise

    # ---- Executor ----------------------------------------------------------------------------------------------------

    def submit(
        self, body: Any, *, timeout_s: float, on_chunk: OnChunk | None = None
    ) -> Future[Any]:
        future: Future[Any] = Future()
        if self._closed:
            future.set_exception(EngineClosedError("the pool was shut down; start a new one"))
        elif isinstance(body, WEIGHT_MESSAGES):
            return self.weight_channel().submit(body, timeout_s)
        elif isinstance(body, cmd.Generate):
            problem = cmd.too_many_samples(body.prompts)
            if problem is not None:
                future.set_exception(InvalidRequestError(problem))
                return future
            for spec in body.prompts:
                check_sendable(spec, timeout_s, f"request {spec.rid!r}")
            call = PoolCall(
                stream=body.stream,
                min_version=body.min_weight_version,
                deadline=time.monotonic() + timeout_s - body.grace_s,
                grace_s=body.grace_s,
                on_chunk=on_chunk,
                future=future,
            )
            self._events.put(lambda: self._dispatcher.add(call, body.prompts))
        else:
            check_sendable(body, timeout_s, type(body).__name__)
            self._events.put(lambda: self._command(body, timeout_s, future))
        return future

    def weight_channel(self) -> Channel:
        return JointChannel(self._fleet)

    @property
    def address(self) -> str:
        with self._lock:
            if self._server is None:
                bind = self._config.listen
                if bind is None and self._socket_folder is not None:
                    bind = f"ipc://{self._socket_folder}/socket"
                insecure = self._config.insecure
                self._server = RpcServer(self._serve, REQUEST_TYPES, bind=bind, insecure=insecure)
                self._server.start()
            return self._server.address

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        replicas = self._on_thread(self._end_all)
        closing = [threading.Thread(target=r.executor.close, daemon=True) for r in replicas]
        for thread in closing:
            thread.start()
        for thread in closing:
            thread.join(timeout=30.0)
        self._fleet.close()
        self._events.put(None)
        self._thread.join(timeout=30.0)
        while not self._events.empty():  # What the end of the replicas has brought.
            event = self._events.get()
            if event is not None:
                event()
        with self._lock:
            if self._server is not None:
                self._server.close()
                self._server = None
        if self._socket_folder is not None:
            shutil.rmtree(self._socket_folder, ignore_errors=True)

    def _end_all(self) -> list[Replica]:
        self._dispatcher.expect_aborts("the pool was shut down")
        self._dispatcher.block(EngineClosedError("the pool was shut down; start a new one"))
        return self._supervisor.close()

    # ---- what only a pool has ----------------------------------------------------------------------------------------

    @property
    def served(self) -> ServedVersion:
        """What all serving replicas hold."""
        return self._fleet.served

    def add_replica(self) -> int:
        """Start one more; returns its number once it serves."""
        return self._await_start(self._start())

    def remove_replica(self, number: int | None, timeout_s: float) -> int:
        """Let a replica (None: the least busy one) finish what it has, then end it; returns its number."""
        done: Future[int] = Future()
        end = time.monotonic() + timeout_s

        def retire() -> None:
            everybody = self._supervisor.replicas
            staying = [n for n, r in everybody.items() if r.state is not State.RETIRING]
            loads = {n: load for n, load in self._dispatcher.loads.items() if n in staying}
            leaving = (
                min(loads, key=lambda n: (loads[n], -n)) if number is None and loads else number
            )
            if leaving is None or leaving not in staying:
                raise RolloutError(
                    f"remove_replica: got {leaving}, expected one of {sorted(staying)}"
                )
            if not self._supervisor.others_serve(leaving):
                raise RolloutError(
                    "remove_replica: got the last replica, expected another one to go on; shut the pool down instead"
                )
            self._supervisor.retire(leaving, end, done)

        self._on_thread(retire)
        return wait(done, timeout_s + 60.0, "the end of a replica")

    def replica_statuses(self) -> list[ReplicaStatus]:
        """What the replicas look like now."""

        def look() -> list[ReplicaStatus]:
            loads, behind = self._dispatcher.loads, self._fleet.behind
            return [
                replica.status(loads.get(number, 0), behind.get(number))
                for number, replica in sorted(self._supervisor.replicas.items())
            ]

        return self._on_thread(look)

    # ---- the pool's thread -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        next_tick = 0.0
        while True:
            try:
                event = self._events.get(timeout=left_s(next_tick))
            except queue.Empty:
                event = _nothing
            if event is None:
                return
            try:
                event()
                now = time.monotonic()
                if now >= next_tick:  # Under load as well.
                    next_tick = now + self._tick_s
                    self._dispatcher.expire(now)
                    self._supervisor.tick(now)
            except Exception:  # One event must not end the dispatching of all requests.
                logger.exception("the pool failed at an event")

    def _on_thread(self, function: Callable[[], T]) -> T:
        """What `function` returns or raises on the pool's thread."""
        future: Future[T] = Future()
        self._events.put(lambda: resolve(future, function))
        return wait(future, 30.0, "the pool's thread")

    def _start(self) -> Future[int]:
        came: Future[int] = Future()
        self._events.put(lambda: self._supervisor.start(came))
        return came

    def _await_start(self, came: Future[int]) -> int:
        limit = self._config.start_timeout_s + self._config.request_timeout_s
        number: int = wait(came, limit, "the start of a replica")
        return number

    def _serve(self, call: Call) -> None:
        """A command from another process."""
        if isinstance(call.body, WEIGHT_MESSAGES):
            self._fleet.handle(call)
            return
        if isinstance(call.body, cmd.Shutdown):
            call.fail(RolloutError("a pool is shut down by its owner; close your connection"))
            return
        try:
            future = self.submit(call.body, timeout_s=left_s(call.deadline), on_chunk=call.stream)
        except InvalidRequestError as error:
            call.fail(error)
            return

        def answer(done: Future[Any]) -> None:
            error = done.exception()
            if error is None:
                call.reply(done.result())
            else:
                call.fail(error)

        future.add_done_callback(answer)

    def _command(self, body: Any, timeout_s: float, future: Future[Any]) -> None:
        """Carry out what is not about prompts or weights."""
        if isinstance(body, cmd.AbortRequests):
            why = "aborted by the caller"
            resolve(
                future,
                lambda: cmd.Done(count=self._dispatcher.abort(body.rids, body.abort_all, why)),
            )
            return
        num = 0
        leaving = _weights_leave(body)
        replicas = list(self._supervisor.replicas.values())
        if isinstance(body, cmd.GetWeights | cmd.SaveShardedModel):
            serving = self._fleet.serving
            replicas = sorted(replicas, key=lambda replica: replica.number not in serving)[:1]
        elif isinstance(body, StandingOrders.KINDS):
            self._supervisor.note(body)
        if isinstance(body, cmd.PauseGeneration) and body.mode == "abort":
            num = self._dispatcher.expect_aborts(ABORTED)
        if leaving is not None:
            # First, so that what the replicas end now waits here instead of going to the next one.
            self._supervisor.releasing = leaving
            self._supervisor.reconcile()
        asked = [replica.executor.submit(body, timeout_s=timeout_s) for replica in replicas]

        def conclude() -> None:
            if isinstance(body, cmd.ResumeMemory):
                self._supervisor.reconcile()  # Who could not be brought up for lack of memory is tried again.
            resolve(future, lambda: self._combined(answers_of(asked), num))

        def released() -> None:
            self._supervisor.releasing = None
            self._supervisor.reconcile()
            conclude()

        def look() -> None:  # Whether they have released it is theirs to say.
            looked = self._fleet.look()
            looked.add_done_callback(lambda _: self._events.put(released))

        then = conclude if leaving is None else look
        when_all_have_answered(asked, self._events.put, then)

    def _combined(self, answers: Sequence[Any], num: int) -> Any:
        first = answers[0]
        if isinstance(first, cmd.Status):
            return self._status(answers)
        if isinstance(first, cmd.WeightValues | cmd.ProfileWritten):
            return first
        if isinstance(first, cmd.ExpertCounts):
            total = sum(np.frombuffer(answer.data, dtype="<i8") for answer in answers)
            return msgspec.structs.replace(first, data=np.asarray(total, dtype="<i8").tobytes())
        if isinstance(first, cmd.MemoryChanged):
            return msgspec.structs.replace(first, num_bytes=sum(a.num_bytes for a in answers))
        return cmd.Done(count=num + sum(answer.count for answer in answers))

    def _status(self, answers: Sequence[cmd.Status]) -> cmd.Status:
        served = self._fleet.served
        sums: dict[str, Any] = {
            name: sum(getattr(status, name) for status in answers)
            for name in ("num_running", "num_waiting", "num_free_blocks", "num_blocks")
        }
        for name in ("num_decoded_tokens", "num_prompt_tokens"):
            sums[name] = sum(getattr(status, name) for status in answers)
        sums["step_s"] = sum(status.step_s for status in answers)
        counts = zip(*(status.step_counts for status in answers), strict=True)
        sums["step_counts"] = [sum(column) for column in counts]
        sums["num_waiting"] += self._dispatcher.num_waiting
        return msgspec.structs.replace(
            answers[0],
            weight_version=served.label,
            version=served.version,
            torn=self._fleet.torn,
            released=sorted({tag for status in answers for tag in status.released}),
            pid=os.getpid(),
            **sums,
        )


def _weights_leave(body: Any) -> str | None:
    """What happens to the replicas' weights by this command, when they are not usable afterwards."""
    if isinstance(body, cmd.ResetWeights):
        return "the weights are being reset to noise"
    if isinstance(body, cmd.ReleaseMemory) and not body.keep_weights and "weights" in body.tags:
        return "the memory of the weights is being released"
    return None


def _nothing() -> None:
    """The event of a while without events."""
