"""Rank 0's half of publishing together: it hears every rank, decides, and drives the engines.

Ranks talk to it over connections, not through collectives of the trainer's groups: each message has an id and a
deadline, a rank that died is noticed while it is waited for, and a failure leaves no group out of step.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from .deadline import Deadline
from .errors import ERRORS, DeadlineExceeded, ManifestMismatch, SessionError, TrainerDiedError
from .messages import ErrorReply, ProcessRef
from .process import why_dead
from .report import SyncReport
from .rpc import Call, RpcServer
from .rpc_wire import raised
from .spmd_engines import Engines, Target
from .spmd_messages import (
    Describe,
    Failed,
    Finish,
    Grant,
    Noted,
    Offer,
    Outcome,
    PlanReply,
    RankRequest,
    Wrote,
)
from .spmd_plan import Decision, buckets_of, decide
from .update import UpdateOptions

_LOOK_S = 0.1


class Coordinator:
    """Serves the ranks; `run` makes one update of what they bring. One per mesh, in the process of rank 0."""

    def __init__(
        self, num_ranks: int, engines: Engines, *, secret: bytes, bind: str | None = None
    ) -> None:
        self._num_ranks = num_ranks
        self._engines = engines
        self._secret = secret
        self._changed = threading.Condition()
        self._inbox: dict[tuple[int, str], dict[int, Call]] = defaultdict(dict)
        self._failure: dict[int, BaseException] = {}
        self._done = 0
        self._processes: dict[int, ProcessRef] = {}
        self._plan = 0
        self._decision: Decision | None = None
        self._strict: tuple[bool, bool] | None = None
        self._server = RpcServer(self._handle, RankRequest, bind=bind, name="spmd")
        self._server.start()

    @property
    def address(self) -> str:
        """Where ranks connect."""
        return self._server.address

    def run(
        self, update: int, engine: Target | None, options: UpdateOptions, deadline: Deadline
    ) -> None:
        """Bring update number `update` to its end. Every rank hears of it, rank 0 too; nothing is raised here."""
        try:
            reports = self._publish(update, engine, options, deadline)
        except BaseException as error:
            self._engines.abort(f"{type(error).__name__}: {error}"[:4000])
            self._fail(update, error)
            return
        with self._changed:
            self._done = update
            calls = self._inbox[update, Finish.__name__]
            owners = self._owners(update)
            self._forget(update)
        for rank, call in calls.items():
            call.reply(Outcome(report=reports[sum(owner <= rank for owner in owners[1:])]))

    def close(self) -> None:
        """Fail whoever waits, and stop serving; the engines go on."""
        with self._changed:
            waiting = [update for update, _ in self._inbox]
        for update in waiting:
            self._fail(update, SessionError("rank 0 closed its publisher; make a new one"))
        self._engines.close()
        self._server.close()

    def _publish(
        self, update: int, engine: Target | None, options: UpdateOptions, deadline: Deadline
    ) -> list[SyncReport]:
        offers = self._gather(update, Offer, deadline)
        targets = self._targets(offers, engine)
        # A decision holds for one arena and one strictness; anything else starts with the ranks' descriptions.
        asked = (options.strict, options.cast)
        if self._engines.connect(targets, deadline) or asked != self._strict:
            self._decision = None
        if self._decision is None or any(o.body.plan != self._plan for o in offers):
            self._decision = None
            for offer in offers:
                offer.reply(Grant(describe=True))
            self._decide(self._gather(update, Describe, deadline), options, deadline)
            self._strict = asked
        else:
            for offer in offers:
                offer.reply(Grant())
        return self._carry(update, options, deadline)

    def _carry(self, update: int, options: UpdateOptions, deadline: Deadline) -> list[SyncReport]:
        """Announce the buckets as the ranks complete them, and commit."""
        decision, layout = self._decision, self._engines.layout
        assert decision is not None and layout is not None
        start = time.perf_counter()
        self._engines.begin(options, decision, deadline)
        totals: dict[int, int] = {}
        for number, rows in enumerate(buckets_of(layout.manifest, decision.rows)):
            values = np.zeros(len(rows), dtype=np.uint64)
            for call in self._gather(update, Wrote, deadline, number):
                values += np.frombuffer(call.body.values, dtype="<u8")
            self._engines.announce(rows, values, deadline)
            totals.update((row, int(values[i])) for i, row in enumerate(rows.tolist()))
        finished = self._gather(update, Finish, deadline)
        self._compare(decision, finished, totals)
        return self._engines.commit(time.perf_counter() - start, deadline)

    def _decide(self, described: list[Call], options: UpdateOptions, deadline: Deadline) -> None:
        layout = self._engines.layout
        assert layout is not None
        decision = decide(
            layout,
            [call.body.tensors for call in described],
            strict=options.strict,
            cast=options.cast,
            ignored=lambda names: self._engines.ignored(names, deadline),
        )
        info = self._engines.info(deadline)
        self._plan += 1
        self._decision = decision
        for call, actions in zip(described, decision.actions, strict=True):
            reply = PlanReply(
                plan=self._plan,
                engine=info,
                bucket_bytes=self._engines.bucket_bytes,
                arena=self._engines.handle,
                rows=decision.rows.astype("<u4").tobytes(),
                writes=actions,
                ignored=tuple(sorted(decision.ignored)),
            )
            call.reply(Grant(plan=reply))

    def _compare(self, decision: Decision, finished: list[Call], totals: dict[int, int]) -> None:
        """Tied weights under two names must agree."""
        sums: dict[tuple[str, int], int] = defaultdict(int)
        for call, compared in zip(finished, decision.compared, strict=True):
            values = np.frombuffer(call.body.twins, dtype="<u8").tolist()
            for key, value in zip(compared, values, strict=True):
                sums[key] = (sums[key] + value) & ((1 << 64) - 1)
        wrong = [
            f"{name}: differs from {decision.origins[row]}, which is the same tensor in this model (tied weights)"
            for (name, row), value in sums.items()
            if totals[row] != value
        ]
        if wrong:
            raise ManifestMismatch(
                f"{len(wrong)} problems with the trainer's tensors; nothing was written:\n  "
                + "\n  ".join(wrong)
                + "\nsend one of the names, or equal values"
            )

    def _targets(self, offers: list[Call], engine: Target | None) -> Sequence[Target]:
        targets: list[Target] = [] if engine is None else [engine]
        targets += [o.body.engine for o in offers if o.body.engine is not None and o.body.rank]
        if not targets:
            raise ValueError(
                "no engine: got None on every rank of the mesh, expected an engine or its address on rank 0 at least"
            )
        return targets

    def _owners(self, update: int) -> list[int]:
        """Ranks that brought an engine, ascending."""
        offers = self._inbox[update, Offer.__name__]
        return sorted(rank for rank, call in offers.items() if call.body.engine is not None)

    def _handle(self, call: Call) -> None:
        """On the I/O thread: note what came, and answer what needs no decision."""
        body: Any = call.body
        if body.secret != self._secret or body.rank >= self._num_ranks:
            raise SessionError(
                f"not a rank of this trainer: got rank {body.rank}, expected one of {self._num_ranks} that were told "
                "the secret over the mesh; make the publisher on every rank"
            )
        with self._changed:
            if body.update <= self._done:
                error = self._failure.get(body.update) or SessionError(
                    f"update {body.update} is over: got a message of rank {body.rank} for it, expected one for "
                    f"update {self._done + 1}; every rank must publish as often as the others"
                )
                call.fail(error)
                return
            if isinstance(body, Offer):
                self._processes[body.rank] = body.process
            if isinstance(body, Failed):
                message = f"{body.message} (on rank {body.rank} of the trainer's mesh)"
                failure = raised(ErrorReply(code=body.code, message=message), ERRORS)
                self._failure.setdefault(body.update, failure)
            kind = type(body).__name__
            if isinstance(body, Wrote):
                kind += str(body.bucket)
            self._inbox[body.update, kind][body.rank] = call
            self._changed.notify_all()
        if isinstance(body, Wrote | Failed):
            call.reply(Noted())

    def _gather(
        self, update: int, kind: type, deadline: Deadline, number: int | None = None
    ) -> list[Call]:
        """That message of every rank, in the order of ranks."""
        name = kind.__name__ + ("" if number is None else str(number))
        with self._changed:
            while True:
                if update in self._failure:
                    raise self._failure[update]
                calls = self._inbox[update, name]
                if len(calls) == self._num_ranks:
                    return [calls[rank] for rank in range(self._num_ranks)]
                missing = [rank for rank in range(self._num_ranks) if rank not in calls]
                self._check_alive(missing)
                try:
                    left_s = deadline.left_s("publish")
                except DeadlineExceeded:
                    raise DeadlineExceeded(
                        f"ranks {missing} of the mesh did not come to {kind.__name__!r} of update {update}: got "
                        f"{len(calls)} of {self._num_ranks} in {deadline.timeout_s:.1f} s, expected every rank to "
                        "publish at the same point; look at what keeps them, or raise timeout_s"
                    ) from None
                self._changed.wait(min(left_s, _LOOK_S))

    def _check_alive(self, ranks: list[int]) -> None:
        for rank in ranks:
            process = self._processes.get(rank)
            why = None if process is None else why_dead(process)
            if why is not None:
                raise TrainerDiedError(
                    f"rank {rank} of the trainer's mesh is gone ({why}): got no shards of it, expected every rank to "
                    "publish; nothing was written; restart the trainer"
                )

    def _fail(self, update: int, error: BaseException) -> None:
        """Tell all ranks, those too that come late."""
        with self._changed:
            self._failure[update] = error
            self._done = max(self._done, update)
            calls = [
                call
                for (of, _), by_rank in self._inbox.items()
                if of <= update
                for call in by_rank.values()
            ]
            self._forget(update)
        for call in calls:
            call.fail(error)

    def _forget(self, update: int) -> None:
        for key in [key for key in self._inbox if key[0] <= update]:
            del self._inbox[key]
        for old in [old for old in self._failure if old < update]:
            del self._failure[old]
