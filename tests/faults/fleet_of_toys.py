"""Toy engines behind one `FleetWeights`, for tests of what a pool does with updates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future

import pytest
from sync_support import ToyEngine, eventually

from rollout.pool.fleet import FleetWeights, ReplicaMember
from rollout.protocol.commands import GetWeights, WeightValues
from weight_sync import EngineDiedError, WeightPublisher
from weight_sync.joint.service import JointChannel


class Fleet:
    """Toy engines behind one `FleetWeights`; what `WeightPublisher` takes as an engine."""

    def __init__(self, make_engine: Callable[..., ToyEngine]) -> None:
        self._make_engine = make_engine
        self.engines: list[ToyEngine] = []
        self.members: list[ReplicaMember] = []
        self.weights = FleetWeights(label="0", timeout_s=60.0)

    def weight_channel(self) -> JointChannel:
        return JointChannel(self.weights)

    def add(self, *, looks: bool = True) -> ToyEngine:
        """One more engine; raises when it cannot be brought to the served version. looks: out for mixtures."""
        engine = self._make_engine(serve=True)
        if not looks:
            engine.host.look_away()
        self.engines.append(engine)
        self.members.append(
            ReplicaMember(
                name=f"replica {len(self.members)}",
                number=len(self.members),
                channel=engine.weight_channel(),
                ask=lambda body, timeout_s: read(engine, body),
            )
        )
        self.weights.add(self.members[-1]).result(20)
        return engine

    def kill(self, number: int) -> None:
        """Its connection breaks, as when its process dies."""
        server = self.engines[number].server
        assert server is not None
        server.close()
        assert eventually(lambda: self.members[number].channel.dead is not None)

    def lone(self, number: int) -> WeightPublisher:
        """A publisher that goes behind the fleet's back."""
        return WeightPublisher(self.engines[number].address)

    @property
    def values(self) -> list[set[float]]:
        return [engine.values() for engine in self.engines]

    @property
    def versions(self) -> list[int]:
        return [engine.receiver.version for engine in self.engines]


def read(engine: ToyEngine, body: GetWeights) -> Future[WeightValues]:
    """What an engine answers, or why it does not."""
    future: Future[WeightValues] = Future()
    if engine.server is None or engine.server._closing:
        future.set_exception(EngineDiedError("killed"))
        return future
    tensor = engine.weight_map.locate(body.name).read().float()
    rows = tensor[body.first_row : body.first_row + body.truncate_size] if tensor.dim() else tensor
    future.set_result(
        WeightValues(shape=list(rows.shape), data=rows.contiguous().numpy().tobytes())
    )
    return future


@pytest.fixture(name="fleet")
def three_toys(make_engine: Callable[..., ToyEngine]) -> Iterator[Fleet]:
    """A fleet of three, closed afterwards."""
    fleet = Fleet(make_engine)
    for _ in range(3):
        fleet.add()
    yield fleet
    fleet.weights.close()
    for member in fleet.members:
        member.channel.close()
