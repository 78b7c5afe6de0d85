"""The executor of a pool: commands of one engine's surface, carried out by many engines.

Prompts go to one replica each, weight messages to all through the fleet, and whatever else there is to all, with the
answers added up.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, get_args

import msgspec

from weight_sync.publisher.channel import Channel
from weight_sync.wire.messages import WeightRequest
from weight_sync.wire.rpc import Call, RpcServer

from ..config import EngineConfig, default_block_size
from ..engine.executors.executor import OnChunk, wait
from ..errors import EngineClosedError, InvalidRequestError, NoUpdateYetError, RolloutError
from ..protocol import commands as cmd
from ..protocol.wire import REQUEST_TYPES, check_sendable
from .config import PoolConfig
from .dispatcher import Dispatcher
from .fleet import FleetWeights
from .fleet_channel import FleetChannel
from .job import PoolCall
from .replica import Replica, ReplicaExecutor, ReplicaStatus, ask_all
from .routing import Router
from .supervisor import MakeExecutor, Supervisor, no_weights

logger = logging.getLogger(__name__)

_EXPIRE_INTERVAL_S = 0.25
WEIGHT_MESSAGES = get_args(WeightRequest)


class PoolExecutor:
    """Runs the dispatcher on a thread of its own; see `Executor` for the methods."""

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
        self._socket_folder = socket_folder
        self._config = config
        self._server: RpcServer | None = None
        self._lock = threading.Lock()
        self._closed = False
        self._events: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        limit = pool.max_inflight_samples or max(1, config.max_running_requests * 5 // 4)
        self._fleet = FleetWeights(
            label=config.weight_version if config.weight_version is not None else "0",
            timeout_s=config.request_timeout_s,
            on_change=lambda: self._supervisor.changed(),
            group_host=group_host,
            awaits=NoUpdateYetError.STATE if config.awaits_first_update else None,
        )
        self._dispatcher = Dispatcher(
            Router(
                limit=limit,
                affinity_tokens=pool.affinity_blocks
                * (config.block_size or default_block_size(config.device)),
                slack=pool.affinity_slack,
            ),
            seed=secrets.randbits(63) if config.seed is None else config.seed,
            max_reruns=pool.max_reruns,
            on_lost=lambda number, error: self._supervisor.lost(number, error),
            served=lambda: (self._fleet.served.label, self._fleet.served.version),
        )
        self._supervisor = Supervisor(
            pool,
            make_executor=make_executor,
            make_replica=self._replica,
            dispatcher=self._dispatcher,
            post=self._events.put,
            fleet=self._fleet,
        )
        self._thread = threading.Thread(target=self._run, name="pool-dispatch", daemon=True)
        self._thread.start()
        starts = [self._supervisor.start() for _ in range(pool.num_replicas)]
        try:
            for start in starts:
                self._await_start(start)
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
            return FleetChannel(self._fleet).submit(body, timeout_s)
        elif isinstance(body, cmd.Generate):
            problem = cmd.too_many_samples(body.prompts)
            if problem is not None:
                future.set_exception(InvalidRequestError(problem))
                return future
            for spec in body.prompts:
                check_sendable(spec, timeout_s, f"request {spec.rid!r}")
            call = PoolCall(
                stream=body.stream,
                deadline=time.monotonic() + timeout_s - body.grace_s,
                grace_s=body.grace_s,
                on_chunk=on_chunk,
                future=future,
            )
            self._events.put(lambda: self._dispatcher.add(call, body.prompts))
        else:
            check_sendable(body, timeout_s, type(body).__name__)
            self._events.put(lambda: self._carry_out(body, timeout_s, future))
        return future

    def weight_channel(self) -> Channel:
        return FleetChannel(self._fleet)

    @property
    def address(self) -> str:
        with self._lock:
            if self._server is None:
                bind = self._config.listen
                if bind is None and self._socket_folder is not None:
                    bind = f"ipc://{self._socket_folder}/socket"
                self._server = RpcServer(self._serve, REQUEST_TYPES, bind=bind)
                self._server.start()
            return self._server.address

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True

        def end_all() -> None:
            self._dispatcher.expect_aborts("the pool was shut down")
            self._dispatcher.block(EngineClosedError("the pool was shut down; start a new one"))

        self._events.put(end_all)
        self._supervisor.close()
        self._fleet.close()
        self._events.put(None)
        self._thread.join(timeout=30.0)
        with contextlib.suppress(queue.Empty):  # What the end of the replicas has brought.
            while True:
                event = self._events.get_nowait()
                if event is not None:
                    event()
        with self._lock:
            if self._server is not None:
                self._server.close()
                self._server = None
        if self._socket_folder is not None:
            shutil.rmtree(self._socket_folder, ignore_errors=True)

    # ---- what only a pool has ----------------------------------------------------------------------------------------

    @property
    def version(self) -> int:
        """Number of the version that all serving replicas hold."""
        return self._fleet.served.version

    @property
    def label(self) -> str:
        """Its label."""
        return self._fleet.served.label

    def add_replica(self) -> int:
        """Start one more; returns its number once it serves."""
        return self._await_start(self._supervisor.start())

    def remove_replica(self, number: int | None, timeout_s: float) -> int:
        """Let a replica (None: the least busy one) finish what it has, then end it; returns its number."""
        loads = self._loads()
        if number is None:
            number = min(loads, key=lambda n: (loads[n], -n))
        if number not in self._supervisor.replicas:
            raise RolloutError(
                f"remove_replica: got {number}, expected one of {sorted(self._supervisor.replicas)}"
            )
        if len(loads) < 2:
            raise RolloutError(
                "remove_replica: got the last replica, expected another one to go on; shut the pool down instead"
            )
        leaving = number
        self._supervisor.retire(leaving, lambda: not self._loads().get(leaving), timeout_s)
        return number

    def replica_statuses(self) -> list[ReplicaStatus]:
        """What the replicas look like now."""
        loads, behind, serving = self._loads(), dict(self._fleet.behind), self._fleet.serving
        statuses = []
        for number, replica in sorted(self._supervisor.replicas.items()):
            executor: Any = replica.executor
            statuses.append(
                ReplicaStatus(
                    number=number,
                    state="serving" if number in serving else "behind",
                    address=executor.address,
                    num_inflight=loads.get(number, 0),
                    pids=tuple(getattr(executor, "pids", ())),
                    node_id=getattr(executor, "node_id", None),
                    why_behind=str(behind[number]) if number in behind else None,
                )
            )
        return statuses

    # ---- below -------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        next_expire = 0.0
        while True:
            event: Callable[[], None] | None = _nothing
            with contextlib.suppress(queue.Empty):
                event = self._events.get(timeout=_EXPIRE_INTERVAL_S)
            if event is None:
                return
            try:
                event()
            except Exception:  # One event must not end the dispatching of all requests.
                logger.exception("the pool's dispatcher failed at an event")
            if (now := time.monotonic()) >= next_expire:
                next_expire = now + _EXPIRE_INTERVAL_S
                self._dispatcher.expire(now)

    def _await_start(self, start: Future[int]) -> int:
        limit = self._config.start_timeout_s + self._config.request_timeout_s
        number: int = wait(start, limit, "the start of a replica")
        return number

    def _replica(self, number: int, executor: ReplicaExecutor) -> Replica:
        return Replica(number, executor, self._dispatcher, self._events.put, time.monotonic)

    def _loads(self) -> dict[int, int]:
        future: Future[dict[int, int]] = Future()
        self._events.put(lambda: future.set_result(self._dispatcher.loads))
        return future.result(30.0)

    def _serve(self, call: Call) -> None:
        """A command from another process."""
        if isinstance(call.body, WEIGHT_MESSAGES):
            self._fleet.handle(call)
            return
        if isinstance(call.body, cmd.Shutdown):
            call.fail(RolloutError("a pool is shut down by its owner; close your connection"))
            return
        left_s = max(0.001, call.deadline - time.monotonic())
        try:
            future = self.submit(call.body, timeout_s=left_s, on_chunk=call.stream)
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

    def _carry_out(self, body: Any, timeout_s: float, future: Future[Any]) -> None:
        try:
            self._command(body, timeout_s, future)
        except Exception as error:  # Whoever asked waits for an answer.
            future.set_exception(error)

    def _command(self, body: Any, timeout_s: float, future: Future[Any]) -> None:
        """Carry out what is not about prompts or weights; on the dispatcher's thread."""
        num, post = 0, self._events.put
        replicas = list(self._supervisor.replicas.values())
        if isinstance(body, cmd.AbortRequests):
            num = self._dispatcher.abort(body.rids, body.abort_all, "aborted by the caller")
            future.set_result(cmd.Done(count=num))
            return
        if isinstance(body, cmd.GetWeights):
            serving = self._fleet.serving
            replicas.sort(key=lambda replica: replica.number not in serving)
            ask_all(replicas[:1], body, timeout_s, lambda answers: answers[0], future, post)
            return
        if isinstance(body, cmd.PauseGeneration):
            self._supervisor.note_pause(body)
            if body.mode == "abort":
                num = self._dispatcher.expect_aborts(
                    "generation was paused (mode abort); resubmit prompt plus partial output"
                )
        elif isinstance(body, cmd.ContinueGeneration):
            self._supervisor.note_pause(None)
        elif (
            isinstance(body, cmd.ReleaseMemory) and "weights" in body.tags and not body.keep_weights
        ):
            # First, so that what the replicas end now waits here instead of going to the next one.
            self._fleet.lose("the memory of the weights was released")
            self._dispatcher.refuse(no_weights(self._fleet.lost))
        ask_all(
            replicas, body, timeout_s, lambda answers: self._combined(answers, num), future, post
        )

    def _combined(self, answers: Sequence[Any], num: int) -> Any:
        first = answers[0]
        if isinstance(first, cmd.Status):
            return self._status(answers)
        if isinstance(first, cmd.MemoryChanged):
            return msgspec.structs.replace(first, num_bytes=sum(a.num_bytes for a in answers))
        return cmd.Done(count=num + sum(answer.count for answer in answers))

    def _status(self, answers: Sequence[cmd.Status]) -> cmd.Status:
        served = self._fleet.served
        sums = {
            name: sum(getattr(status, name) for status in answers)
            for name in ("num_running", "num_waiting", "num_free_blocks", "num_blocks")
        }
        sums["num_waiting"] += self._dispatcher.num_waiting
        nobody = None if self._fleet.serving else f"no replica holds version {served.version}"
        return msgspec.structs.replace(
            answers[0],
            weight_version=served.label,
            version=served.version,
            torn=self._fleet.lost or nobody,
            pid=os.getpid(),
            **sums,
        )


def _nothing() -> None:
    """The event of a while without events."""
