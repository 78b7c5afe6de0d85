"""Publishing from a trainer that is many processes, each with its own shards: FSDP2, tensor parallelism, or both.

    publisher = SpmdPublisher(device_mesh)                        # on every rank
    report = publisher.publish(model, engine)                     # on every rank; only rank 0 needs the engine

Nothing is gathered. Rank 0 makes one arena in the engine's layout, every rank writes its own shards into it, each byte
once, and sends the sums that its shards add to the tensors' fingerprints. Rank 0 alone talks to the engine.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
import weakref
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Self

import msgspec
import numpy as np
import torch

from ..errors import (
    ERRORS,
    EngineDiedError,
    SessionError,
    SyncError,
    TrainerDiedError,
    TransportError,
)
from ..layout.manifest import dtype_name
from ..layout.named_tensors import NamedTensors
from ..layout.shards import HeldRegion, dense_pairs, held_regions, local_of, placement_of
from ..publisher.endpoint import GroupBackend, TransportChoice
from ..publisher.open_session import UpdateOptions
from ..publisher.selection import Layout
from ..report import SyncReport
from ..transports.shared_memory import WritableSharedMemoryArena
from ..wire.cancellation import on_a_thread
from ..wire.deadline import Deadline
from ..wire.messages import KvPolicyName, VerifyMode
from ..wire.process import Home, close_forgotten, current_process
from ..wire.rpc import RpcClient
from ..wire.rpc_wire import error_reply
from .coordinator import MAX_PLANS, Coordinator
from .engines import Engines, Target
from .group import MeshRanks
from .handover import HandOver
from .messages import (
    Describe,
    Failed,
    Finish,
    Grant,
    Heard,
    Offer,
    Outcome,
    PlanReply,
    RankReply,
    Tensor,
    Wrote,
)
from .share import RankShare

_GRACE_S = 5.0
"""How much longer than rank 0 the others wait, so that they hear its reason."""


class SpmdPublisher:
    """One rank's publisher; make and use it on every rank of `device_mesh`, at the same points.

    `device_mesh` holds all ranks that have shards; None is a trainer of one process. On a mesh of several dimensions
    the first rank along `engine_axis` may bring an engine each; all of them get the same weights. Construction is the
    one collective (a kilobyte is broadcast along the mesh's own groups); after it, ranks talk to rank 0 over
    connections, so a rank that is late, raises or dies costs an error on every rank and leaves no group out of step.
    Ranks share memory and so run on one machine, as one user. `transport="process_group"` carries the arena on to
    engines elsewhere; "shared_memory" has the engines read it where it is.

    A publisher that is collected closes itself, and so it does when the interpreter ends. A forked child is refused.
    """

    def __init__(
        self,
        device_mesh: Any,
        *,
        engine_axis: str | None = None,
        timeout_s: float = 60.0,
        bucket_bytes: int = 512 << 20,
        transport: TransportChoice = "shared_memory",
        group_host: str = "127.0.0.1",
        group_backend: GroupBackend = "auto",
    ) -> None:
        self._home = Home("the publisher")
        self._ranks = MeshRanks(device_mesh, engine_axis)
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._update = 0
        self._plans: OrderedDict[Hashable, tuple[int, RankShare]] = OrderedDict()
        self._arenas: dict[bool, WritableSharedMemoryArena] = {}
        self._coordinator: Coordinator | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._closed = False
        meeting = b""
        if self._ranks.rank == 0:
            engines = Engines(
                bucket_bytes=bucket_bytes,
                transport=transport,
                group_host=group_host,
                group_backend=group_backend,
            )
            secret = secrets.token_bytes(16)
            self._coordinator = Coordinator(self._ranks.size, engines, secret=secret)
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="spmd-coordinator")
            meeting = secret + self._coordinator.address.encode()
        try:
            meeting = self._ranks.from_first(meeting, timeout_s)
            self._secret = meeting[:16]
            self._client = RpcClient(
                meeting[16:].decode(), RankReply, errors=ERRORS, name="spmd-rank"
            )
        except BaseException:
            if self._coordinator is not None:
                self._coordinator.close()
            raise
        self._release = partial(_release, self._client, self._thread, self._coordinator)
        self._finalizer = weakref.finalize(self, close_forgotten, self._release, self._home)

    @property
    def rank(self) -> int:
        """Position in the mesh, row by row; 0 drives the engines."""
        return self._ranks.rank

    def publish(
        self,
        named_tensors: NamedTensors,
        engine: Target | HandOver | None = None,
        *,
        version: int | None = None,
        label: str | None = None,
        strict: bool = True,
        kv_policy: KvPolicyName | None = None,
        verify: VerifyMode = "pause",
        base_version: int | None = None,
        cast: bool = True,
        check_finite: bool = True,
    ) -> SyncReport:
        """Make these tensors the engine's next version; every rank calls it, and every rank returns or raises the same.

        named_tensors: a module, a mapping or pairs, whose tensors exist all at once: DTensors, of which this rank gives
            its shards, and plain ones, which count as replicated. Ranks may have different names (pipeline stages).
        engine: an engine of this process, an address, or (rank 0 alone) a `HandOver`; of rank 0, and of the first ranks
            along `engine_axis`. Other ranks may pass None, and what they pass is not looked at.

        The other arguments are those of `WeightPublisher.publish`; rank 0's count. On the way in nothing is waited for
        but the other ranks; when it returns, the tensors may change.
        """
        options = UpdateOptions(
            version=version,
            label=label,
            strict=strict,
            kv_policy=kv_policy,
            verify=verify,
            base_version=base_version,
            cast=cast,
            check_finite=check_finite,
        )
        self._home.check()
        deadline = Deadline(self._timeout_s)
        with self._lock:
            if self._closed:
                raise SessionError("the publisher was closed; expected an open one; make a new one")
            self._update += 1
            deadline.when_cancelled(partial(self._fail, SessionError("a rank was cancelled")))
            if self._coordinator is not None and self._thread is not None:
                self._thread.submit(self._coordinator.run, self._update, engine, options, deadline)
            try:
                return self._take_part(named_tensors, engine, check_finite)
            except BaseException as error:
                raise self._told(error) from error.__cause__

    async def async_publish(
        self, named_tensors: NamedTensors, *args: Any, **options: Any
    ) -> SyncReport:
        """`publish` for a running event loop."""
        return await on_a_thread(self.publish, named_tensors, *args, **options)

    def close(self) -> None:
        """Give arena and connections back; the engine goes on. Safe to repeat, on ranks in any order.

        In a forked child it does nothing: the publisher is its parent's.
        """
        if not self._home.here:
            return
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._finalizer.detach()
            self._release()
            self._plans.clear()
            while self._arenas:
                self._arenas.popitem()[1].close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take_part(
        self,
        named_tensors: NamedTensors,
        engine: Target | HandOver | None,
        check_finite: bool,
    ) -> SyncReport:
        pairs = dense_pairs(named_tensors)
        key = tuple((name, tuple(t.shape), t.dtype, placement_of(t)) for name, t in pairs)
        plan, share = self._plans.get(key, (0, None))
        offer = Offer(
            secret=self._secret,
            rank=self.rank,
            update=self._update,
            process=current_process(),
            plan=plan,
            engine=self._address(engine),
        )
        grant: Grant = self._call(offer)
        if grant.describe:
            self._plans.pop(key, None)
            pieces = [(name, held_regions(name, tensor)) for name, tensor in pairs]
            grant = self._call(self._description(pairs, pieces))
            assert grant.plan is not None
            share = self._compile(grant.plan, pieces)
            self._plans[key] = grant.plan.plan, share
            if len(self._plans) > MAX_PLANS:
                self._plans.popitem(last=False)
        assert share is not None
        self._plans.move_to_end(key)
        tensors = [local_of(tensor) for _, tensor in pairs]
        return self._write(share, tensors, check_finite)

    def _write(
        self, share: RankShare, tensors: list[torch.Tensor], check_finite: bool
    ) -> SyncReport:
        noted: list[Future[Any]] = []
        for bucket in range(share.num_buckets):
            values = share.write(bucket, tensors)
            if check_finite:
                share.check_finite(bucket)
            message = Wrote(
                secret=self._secret,
                rank=self.rank,
                update=self._update,
                bucket=bucket,
                values=values.astype("<u8").tobytes(),
            )
            noted.append(self._client.submit(message, self._timeout_s + _GRACE_S))
            for future in noted:
                if future.done():
                    future.result()  # refused: writing the rest would be in vain
        finish = Finish(
            secret=self._secret,
            rank=self.rank,
            update=self._update,
            twins=share.compare(tensors).astype("<u8").tobytes(),
        )
        outcome: Outcome = self._call(finish)
        self._tell(Heard(secret=self._secret, rank=self.rank, update=self._update))
        return outcome.report

    def _description(
        self,
        pairs: Sequence[tuple[str, torch.Tensor]],
        pieces: Sequence[tuple[str, Sequence[HeldRegion]]],
    ) -> Describe:
        return Describe(
            secret=self._secret,
            rank=self.rank,
            update=self._update,
            tensors=tuple(
                Tensor(
                    name=name,
                    shape=tuple(tensor.shape),
                    dtype=dtype_name(tensor.dtype),
                    regions=tuple(piece.region for piece in held),
                )
                for (name, tensor), (_, held) in zip(pairs, pieces, strict=True)
            ),
        )

    def _compile(
        self, plan: PlanReply, pieces: Sequence[tuple[str, Sequence[HeldRegion]]]
    ) -> RankShare:
        """Open the arena where it is a new one, and compile this rank's share."""
        handed_over = not plan.engine.engine_id
        arena = self._arenas.get(handed_over)
        if arena is None or arena.handle != plan.arena:
            if arena is not None:
                self._plans.clear()  # some of them write into it; the others are quickly made again
                arena.close()
            arena = self._arenas[handed_over] = WritableSharedMemoryArena(plan.arena)
        return RankShare(
            Layout(plan.engine, plan.bucket_bytes),
            pieces,
            rows=np.frombuffer(plan.rows, dtype="<u4").astype(np.int64),
            actions=plan.writes,
            buffer=arena.buffer,
            skip=frozenset(plan.ignored),
        )

    def _address(self, engine: Target | HandOver | None) -> str | None:
        """What other ranks' engines are reached by; rank 0 has its own as an object."""
        if engine is None or not self._ranks.is_owner:
            return None
        if self.rank == 0:
            return "rank 0"
        address = engine if isinstance(engine, str) else getattr(engine, "address", None)
        if not address:
            raise TransportError(
                f"cannot reach the engine of rank {self.rank}: got {type(engine).__name__}, expected an engine with an "
                "address, or an address; only rank 0 may bring other objects"
            )
        return str(address)

    def _call(self, message: msgspec.Struct) -> Any:
        return self._client.call(message, self._timeout_s + _GRACE_S)

    def _told(self, error: BaseException) -> BaseException:
        """Every rank is to hear of it; and without rank 0 nobody can go on."""
        dead = self._client.dead
        if dead is not None and isinstance(error, EngineDiedError):
            return TrainerDiedError(
                f"rank 0 of the trainer's mesh is gone ({dead}): expected it to publish; restart the trainer"
            )
        if dead is None:
            with contextlib.suppress(SyncError, TimeoutError):
                self._fail(error).result(_GRACE_S)
        return error

    def _fail(self, error: BaseException) -> Future[Any]:
        """Tell rank 0 that this rank cannot go on with the update."""
        reply = error_reply(error)
        failed = Failed(
            secret=self._secret,
            rank=self.rank,
            update=self._update,
            code=reply.code,
            message=reply.message,
        )
        return self._client.submit(failed, _GRACE_S)

    def _tell(self, message: Heard) -> None:
        """Until rank 0 has it: what is on its way when a connection closes may be lost."""
        with contextlib.suppress(SyncError):
            self._client.call(message, _GRACE_S)


def _release(
    client: RpcClient, thread: ThreadPoolExecutor | None, coordinator: Coordinator | None
) -> None:
    """Give back what outlives a publisher that is only dropped. This rank's mapping of the arena goes with it."""
    client.close()
    if thread is not None:
        thread.shutdown()
    if coordinator is not None:
        coordinator.close()
