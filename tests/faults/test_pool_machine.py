"""A fleet of replicas that answer late, refuse, die and come anew, under any order of events: those that the pool says
serve hold what it says it serves, whole, and when all is quiet an update reaches everybody.

Real receivers with tiny models, on threads of this process.
"""

from __future__ import annotations

import time
from concurrent.futures import Future
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from sync_support import ToyEngine, weights

from rollout.pool.fleet import FleetWeights, ReplicaMember
from rollout.protocol.commands import GetWeights, WeightValues
from weight_sync import EngineDiedError, WeightPublisher
from weight_sync.errors import SyncError
from weight_sync.joint.service import JointChannel
from weight_sync.wire import messages as msg

NAP_S = 0.12
"""How long a late replica takes; trainers in a hurry wait for half of it."""
KINDS = (msg.Begin, msg.Bucket, msg.Vote, msg.Commit, msg.Abort, msg.OpenArena, msg.Hello)
HOW = ("late before", "late after", "late before", "late after", "dies before", "dies after")
Trouble = tuple[type, str] | None
TROUBLES = st.sampled_from(
    [
        *[None] * 8,
        *((kind, how) for kind in KINDS for how in HOW),
        *((msg.Commit, where) for where in ("between_steps", "weights_written")),
    ]
)


class Replica:
    """An engine whose answers may be late, and which may die at any message."""

    is_local = False

    def __init__(self, number: int) -> None:
        self.engine = ToyEngine()
        self.number = number
        self.dead: str | None = None
        self.naps: dict[type, str] = {}
        self.dies_at: dict[type, str] = {}
        self._channel = self.engine.weight_channel()
        queue = self.engine.service._queue
        self._answer, self._serve = queue._answer, queue._serve
        queue._answer, queue._serve = self._late_before, self._late_after  # type: ignore[method-assign]

    def _late_before(self, call: Any) -> None:
        self._nap(call, "before")
        self._answer(call)

    def _late_after(self, call: Any) -> Any:
        answer = self._serve(call)
        self._nap(call, "after")
        return answer

    def _nap(self, call: Any, when: str) -> None:
        if self.naps.get(type(call.body)) == when:
            del self.naps[type(call.body)]
            time.sleep(NAP_S)

    def trouble(self, trouble: Trouble) -> None:
        """What happens to it at the next message of a kind, or in the next commit."""
        if trouble is None:
            return
        kind, how = trouble
        if how.startswith("late "):
            self.naps[kind] = how.removeprefix("late ")
        elif how.startswith("dies "):
            self.dies_at[kind] = how.removeprefix("dies ")
        else:
            self.engine.host.fail_in = how

    def submit(self, message: Any, timeout_s: float) -> Future[Any]:
        dies = self.dies_at.pop(type(message), None)
        if dies == "before":
            self.dead = "killed"
        if self.dead is not None:
            return failed(EngineDiedError(self.dead))
        future = self._channel.submit(message, timeout_s)
        if dies == "after":
            self.dead = "killed"
            return failed(EngineDiedError(self.dead))
        return future

    def call(self, message: Any, timeout_s: float) -> Any:
        return self.submit(message, timeout_s).result(timeout_s)

    def lend(self, buffer: Any) -> str:
        raise AssertionError

    def close(self) -> None:
        """The machine closes the engine."""

    def ask(self, body: GetWeights, timeout_s: float) -> Future[WeightValues]:
        if self.dead is not None:
            return failed(EngineDiedError(self.dead))
        tensor = self.engine.weight_map.locate(body.name).read().float()
        rows = (
            tensor[body.first_row : body.first_row + body.truncate_size] if tensor.dim() else tensor
        )
        future: Future[WeightValues] = Future()
        future.set_result(
            WeightValues(shape=list(rows.shape), data=rows.contiguous().numpy().tobytes())
        )
        return future


def failed(error: Exception) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_exception(error)
    return future


class Fleet(RuleBasedStateMachine):
    """The pool's half of updates, one trainer, and what may happen to replicas."""

    def __init__(self) -> None:
        super().__init__()
        self.fleet = FleetWeights(label="v0", timeout_s=5.0)
        self.replicas: list[Replica] = []
        self.publisher = WeightPublisher(self, timeout_s=5.0)
        self.values = {"v0": 0.0}
        self.version = 0

    def weight_channel(self) -> JointChannel:
        """What `WeightPublisher` takes as an engine."""
        return JointChannel(self.fleet)

    @property
    def alive(self) -> list[Replica]:
        return [replica for replica in self.replicas if replica.dead is None]

    @initialize()
    def start(self) -> None:
        for _ in range(3):
            self.one_more()

    @precondition(lambda self: len(self.alive) < 4)
    @rule()
    def one_more(self) -> None:
        replica = Replica(len(self.replicas))
        self.replicas.append(replica)
        member = ReplicaMember(
            name=f"replica {replica.number}",
            number=replica.number,
            channel=replica,
            ask=replica.ask,
        )
        quietly(self.fleet.add(member))

    @rule(
        hurry=st.booleans(),
        troubles=st.lists(TROUBLES, min_size=4, max_size=4) | TROUBLES.map(lambda one: [one] * 4),
    )
    def publish(self, hurry: bool, troubles: list[Trouble]) -> None:
        """An update, in which each replica may have a trouble of its own, or all the same."""
        for replica, trouble in zip(self.alive, troubles, strict=False):
            replica.trouble(trouble)
        before, label = self.fleet.served.label, f"v{len(self.values)}"
        self.values[label] = float(len(self.values))
        self.publisher._timeout_s = NAP_S / 2 if hurry else 5.0
        try:
            report = self.publisher.publish(weights(self.values[label]), label=label)
        except SyncError:
            assert self.fleet.served.label in (before, label, *self.unsettled)
            self.unsettled = (*self.unsettled, label)
        else:
            assert (report.label, self.fleet.served.label) == (label, label)
            self.unsettled = ()

    unsettled: tuple[str, ...] = ()
    """Updates whose trainer got an error since the last that it knows was committed."""

    @rule()
    def tend(self) -> None:
        """What the supervisor does: forget the dead, bring up who is behind."""
        for replica in self.replicas:
            if replica.dead is not None:
                quietly(self.fleet.remove(replica.number))
        for number in sorted(self.fleet.behind):
            quietly(self.fleet.bring_up(number))

    @invariant()
    def who_serves_holds_what_is_served(self) -> None:
        served = self.fleet.served
        assert served.version >= self.version, "versions only grow"
        self.version = served.version
        for replica in self.alive:
            if replica.number in self.fleet.serving:
                receiver = replica.engine.receiver
                assert (receiver.version, receiver.torn) == (served.version, None)
                assert replica.engine.values() == {self.values[served.label]}

    def teardown(self) -> None:
        try:
            self.is_well_when_all_is_quiet()
        finally:
            self.publisher.close()
            self.fleet.close()
            for replica in self.replicas:
                replica.engine.close()

    def is_well_when_all_is_quiet(self) -> None:
        for replica in self.replicas:
            replica.naps.clear()
            replica.dies_at.clear()
            replica.engine.host.fail_in = None
        if not self.alive:
            return
        self.tend()
        self.tend()
        if any(self.could_serve(replica) for replica in self.alive):
            assert self.fleet.serving
        self.publish(hurry=False, troubles=[])
        self.tend()
        assert self.unsettled == ()
        assert self.fleet.serving == {replica.number for replica in self.alive}
        self.who_serves_holds_what_is_served()
        for replica in self.alive:
            assert replica.engine.host.mixtures == []

    def could_serve(self, replica: Replica) -> bool:
        """It holds something whole that is as new as what the pool serves."""
        receiver = replica.engine.receiver
        return receiver.torn is None and receiver.version >= self.fleet.served.version


def quietly(future: Future[None]) -> None:
    """What becomes of it is the machine's to look at."""
    try:
        future.result(20.0)
    except SyncError:
        pass


Fleet.TestCase.settings = settings(
    max_examples=15,
    stateful_step_count=14,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)
TestFleet = pytest.mark.slow(Fleet.TestCase)
