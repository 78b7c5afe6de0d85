"""Several engines of one trainer of many ranks: what one of them refuses, none of them serves."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
from sync_support import ToyEngine, eventually

from weight_sync.errors import EngineRestartedError, WeightUpdateError
from weight_sync.layout.fingerprints import ArenaFingerprints
from weight_sync.publisher.open_session import UpdateOptions
from weight_sync.publisher.publisher import WeightPublisher
from weight_sync.publisher.selection import Layout
from weight_sync.report import SyncReport
from weight_sync.spmd.engines import Engines
from weight_sync.spmd.plan import Decision
from weight_sync.wire.deadline import Deadline


class Rank0:
    """What rank 0 does with its engines, the ranks' part done here."""

    def __init__(self, toys: list[ToyEngine]) -> None:
        self.engines = Engines(bucket_bytes=512 << 20, transport="shared_memory")
        self._targets = [toy.address for toy in toys]

    def publish(self, value: float, *, strict: bool = True) -> SyncReport:
        deadline, engines = Deadline(20.0), self.engines
        try:
            engines.connect(self._targets, deadline)
            layout = Layout(engines.info(None, deadline), engines.bucket_bytes)
            rows = np.arange(len(layout.manifest.tensors))
            engines.begin(UpdateOptions(strict=strict), decision(rows), layout.manifest, deadline)
            assert engines._arena is not None
            buffer = engines._arena.buffer
            for view in layout.manifest.views(buffer):
                view.fill_(value)
            values = ArenaFingerprints(layout.manifest).values(buffer, None).numpy()
            engines.announce(rows, values.view(np.uint64), deadline)
            return engines.commit(0.0, deadline)
        except BaseException as error:
            engines.abort(str(error))
            raise


def decision(rows: np.ndarray) -> Decision:
    return Decision(
        rows=rows,
        actions=[b""],
        compared=[[]],
        origins={},
        casts=[],
        num_tensors=len(rows),
        ignored=frozenset(),
    )


@pytest.fixture
def toys(make_engine: Callable[..., ToyEngine]) -> list[ToyEngine]:
    return [make_engine(serve=True), make_engine(serve=True)]


@pytest.fixture
def rank0(toys: list[ToyEngine]) -> Iterator[Rank0]:
    rank0 = Rank0(toys)
    yield rank0
    rank0.engines.close()


def test_what_one_engine_refuses_at_the_end_is_served_by_none(
    rank0: Rank0, toys: list[ToyEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    rank0.publish(1.0)
    monkeypatch.setattr(toys[1].host, "unwritable", lambda: "a test holds it")
    with pytest.raises(WeightUpdateError, match="a test holds it"):
        rank0.publish(2.0)
    assert [toy.values() for toy in toys] == [{1.0}] * 2
    assert [toy.receiver.version for toy in toys] == [1, 1]
    assert eventually(lambda: all(toy.receiver._session is None for toy in toys))
    monkeypatch.undo()
    assert rank0.publish(3.0).version == 2
    assert [toy.values() for toy in toys] == [{3.0}] * 2


def test_engines_of_different_versions_get_the_same_one(
    rank0: Rank0, toys: list[ToyEngine]
) -> None:
    with WeightPublisher(toys[0].address) as lone:
        lone.publish({m.name: p for m, p in named(toys[0])}, version=7)
    assert rank0.publish(2.0).version == 8
    assert [toy.receiver.version for toy in toys] == [8, 8]
    assert [toy.values() for toy in toys] == [{2.0}] * 2


@pytest.mark.parametrize("number", [1, 2])
def test_engines_that_were_started_anew_are_noticed_and_get_no_part(
    make_engine: Callable[..., ToyEngine], tmp_path_factory: pytest.TempPathFactory, number: int
) -> None:
    folder = tmp_path_factory.mktemp("e")
    addresses = [f"ipc://{folder}/{i}" for i in range(number)]
    toys = [make_engine(serve=True, bind=address) for address in addresses]
    rank0 = Rank0(toys)
    rank0.publish(1.0)
    assert rank0.publish(2.0, strict=False).version == 2
    for toy in toys:
        toy.close()
    toys = [make_engine(serve=True, bind=address) for address in addresses]
    with pytest.raises(EngineRestartedError, match=r"committed version 2.*started anew"):
        rank0.publish(3.0, strict=False)
    assert [toy.values() for toy in toys] == [{0.0}] * number
    assert rank0.publish(4.0).version == 1
    assert rank0.publish(5.0, strict=False).version == 2
    assert [toy.values() for toy in toys] == [{5.0}] * number
    rank0.engines.close()


def named(toy: ToyEngine) -> Iterator[tuple]:  # type: ignore[type-arg]
    for meta in toy.weight_map.metas():
        yield meta, toy.weight_map.locate(meta.name).read()
