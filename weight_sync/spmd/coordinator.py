"""Rank 0's half of publishing together: it hears every rank, decides who writes what, and drives the engines."""

from __future__ import annotations

import time
from collections import OrderedDict, defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import ManifestMismatch, SessionError
from ..publisher.open_session import UpdateOptions
from ..publisher.selection import Layout
from ..report import SyncReport
from ..wire.deadline import Deadline
from ..wire.messages import SharedMemoryHandle
from ..wire.rpc import Call
from .engines import Engines, Target
from .handover import HandingOver, HandOver
from .inbox import RankInbox
from .messages import Describe, Finish, Grant, Offer, Outcome, PlanReply, Wrote
from .plan import Decision, buckets_of, decide

MAX_PLANS = 64
"""Sets of tensors that are remembered: trainers that send a model in batches have one for each batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """What was decided for one set of tensors."""

    decision: Decision
    """Who writes what."""
    layout: Layout
    """The arena's layout."""
    side: Engines | HandingOver
    """Where it goes."""
    arena: SharedMemoryHandle
    """The arena that it was made for."""
    strict: bool
    """What the update that it was made for asked."""
    cast: bool
    """Likewise."""


class Coordinator:
    """Serves the ranks; `run` makes one update of what they bring. One per mesh, in the process of rank 0."""

    def __init__(self, num_ranks: int, engines: Engines, *, secret: bytes) -> None:
        self._engines = engines
        self._handing = HandingOver()
        self._plans: OrderedDict[int, _Plan] = OrderedDict()
        self._last_plan = 0
        self._inbox = RankInbox(num_ranks, secret=secret)

    @property
    def address(self) -> str:
        """Where ranks connect."""
        return self._inbox.address

    def run(
        self,
        update: int,
        engine: Target | HandOver | None,
        options: UpdateOptions,
        deadline: Deadline,
    ) -> None:
        """Bring update number `update` to its end. Every rank hears of it, rank 0 too; nothing is raised here."""
        side = self._handing if isinstance(engine, HandOver) else self._engines
        try:
            offers = self._inbox.gather(update, Offer, deadline)
            side.connect(self._targets(offers, engine), deadline)
            plan = self._plan(update, offers, side, options, deadline)
            finished, report = self._carry(update, plan, options, deadline)
        except BaseException as error:
            side.abort(f"{type(error).__name__}: {error}"[:4000])
            self._inbox.fail(update, error)
            return
        self._inbox.finish(update)
        for call in finished:
            call.reply(Outcome(report=report))

    def close(self) -> None:
        """Fail whoever waits, and stop serving; the engines go on."""
        self._inbox.close(SessionError("rank 0 closed its publisher; make a new one"))
        self._engines.close()
        self._handing.close()

    def _plan(
        self,
        update: int,
        offers: list[Call],
        side: Engines | HandingOver,
        options: UpdateOptions,
        deadline: Deadline,
    ) -> _Plan:
        """The plan that all ranks remember, where it holds; else a new one, from what they describe."""
        offered = {offer.body.plan for offer in offers}
        plan = self._plans.get(min(offered)) if len(offered) == 1 else None
        held = (side.handle, options.strict, options.cast)
        if plan is not None and (plan.arena, plan.strict, plan.cast) == held:
            self._plans.move_to_end(min(offered))
            for offer in offers:
                offer.reply(Grant())
            return plan
        for offer in offers:
            offer.reply(Grant(describe=True))
        return self._decide(self._inbox.gather(update, Describe, deadline), side, options, deadline)

    def _carry(
        self, update: int, plan: _Plan, options: UpdateOptions, deadline: Deadline
    ) -> tuple[list[Call], SyncReport]:
        """Announce the buckets as the ranks complete them, and commit."""
        start = time.perf_counter()
        plan.side.begin(options, plan.decision, plan.layout.manifest, deadline)
        totals: dict[int, int] = {}
        for number, rows in enumerate(buckets_of(plan.layout.manifest, plan.decision.rows)):
            values = np.zeros(len(rows), dtype=np.uint64)
            for call in self._inbox.gather(update, Wrote, deadline, number):
                values += np.frombuffer(call.body.values, dtype="<u8")
            plan.side.announce(rows, values, deadline)
            totals.update((row, int(values[i])) for i, row in enumerate(rows.tolist()))
        finished = self._inbox.gather(update, Finish, deadline)
        self._compare(plan.decision, finished, totals)
        return finished, plan.side.commit(time.perf_counter() - start, deadline)

    def _decide(
        self,
        calls: list[Call],
        side: Engines | HandingOver,
        options: UpdateOptions,
        deadline: Deadline,
    ) -> _Plan:
        described = [call.body.tensors for call in calls]
        info = side.info(described, deadline)
        arena = side.handle
        assert arena is not None
        layout = Layout(info, side.bucket_bytes)
        decision = decide(
            layout,
            described,
            strict=options.strict,
            cast=options.cast,
            ignored=lambda names: side.ignored(names, deadline),
        )
        self._last_plan += 1
        plan = _Plan(
            decision=decision,
            layout=layout,
            side=side,
            arena=arena,
            strict=options.strict,
            cast=options.cast,
        )
        self._plans[self._last_plan] = plan
        if len(self._plans) > MAX_PLANS:
            self._plans.popitem(last=False)
        for call, actions in zip(calls, decision.actions, strict=True):
            reply = PlanReply(
                plan=self._last_plan,
                engine=info,
                bucket_bytes=side.bucket_bytes,
                arena=arena,
                rows=decision.rows.astype("<u4").tobytes(),
                writes=actions,
                ignored=tuple(sorted(decision.ignored)),
            )
            call.reply(Grant(plan=reply))
        return plan

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

    def _targets(self, offers: list[Call], engine: Target | HandOver | None) -> list[Any]:
        targets: list[Any] = [] if engine is None else [engine]
        targets += [o.body.engine for o in offers if o.body.engine is not None and o.body.rank]
        if not targets:
            raise ValueError(
                "no engine: got None on every rank of the mesh, expected an engine or its address on rank 0 at least"
            )
        return targets
