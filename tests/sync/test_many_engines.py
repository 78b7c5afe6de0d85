"""One publisher for several engines: packed once, one vote, and all of them serve the new version or none does."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sync_support import ToyEngine, eventually, weights

import weight_sync
from rollout import Engine
from weight_sync.errors import (
    DeadlineExceeded,
    EngineDiedError,
    ManifestMismatch,
    StaleVersionError,
    WeightUpdateError,
)
from weight_sync.publisher.publisher import WeightPublisher


@pytest.fixture
def toys(make_engine: Callable[..., ToyEngine]) -> list[ToyEngine]:
    return [make_engine(serve=True), make_engine(serve=True), make_engine(serve=True)]


@pytest.fixture(params=["shared_memory", "process_group"])
def publisher(request: pytest.FixtureRequest, toys: list[ToyEngine]) -> Iterator[WeightPublisher]:
    # Addresses and objects may be mixed.
    targets = [toys[0].address, toys[1], toys[2].address]
    with WeightPublisher(targets, transport=request.param, timeout_s=20.0) as publisher:
        yield publisher


def serve(toys: list[ToyEngine], value: float, version: int) -> None:
    """All of them hold this value under this version, and no session is left."""
    assert [toy.values() for toy in toys] == [{value}] * len(toys)
    assert [toy.receiver.version for toy in toys] == [version] * len(toys)
    assert eventually(lambda: all(toy.receiver._session is None for toy in toys))


def test_one_pack_reaches_all_of_them_again_and_again(
    publisher: WeightPublisher, toys: list[ToyEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    from weight_sync.layout import encoding

    copies: list[int] = []
    copy = encoding.copy_tensors
    monkeypatch.setattr(
        encoding, "copy_tensors", lambda a, b: copies.append(len(list(b))) or copy(a, b)
    )
    for version in range(1, 4):
        report = publisher.publish(weights(float(version)), label=f"step {version}")
        assert (report.version, report.label) == (version, f"step {version}")
        serve(toys, float(version), version)
    assert publisher.fingerprint() == report.fingerprint
    assert publisher.engine_info().version == 3
    assert sum(copies) == 3 * len(weights(0.0))


def test_a_session_and_its_async_twins_are_for_all_of_them(
    publisher: WeightPublisher, toys: list[ToyEngine]
) -> None:
    tensors = list(weights(1.0).items())
    with publisher.session() as session:
        session.send(tensors[:4])
        session.send(tensors[4:])
    serve(toys, 1.0, 1)

    async def again() -> None:
        await publisher.async_begin()
        await publisher.async_send(list(weights(2.0).items()))
        await publisher.async_abort()
        serve(toys, 1.0, 1)
        assert await publisher.async_begin(label="two") == 2
        await publisher.async_send(list(weights(2.0).items()))
        assert (await publisher.async_commit()).version == 2
        await publisher.async_publish(weights(3.0))

    asyncio.run(again())
    serve(toys, 3.0, 3)


def test_what_one_refuses_none_serves_and_the_error_says_which(
    publisher: WeightPublisher, toys: list[ToyEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher.publish(weights(1.0))
    monkeypatch.setattr(toys[1].host, "unwritable", lambda: "a test holds it")
    with pytest.raises(WeightUpdateError, match="a test holds it") as caught:
        publisher.publish(weights(2.0))
    assert "said by engine 1" in caught.value.__notes__
    serve(toys, 1.0, 1)
    monkeypatch.undo()
    publisher.publish(weights(3.0))
    serve(toys, 3.0, 2)


def test_with_a_dead_one_none_is_updated_and_its_successor_joins_in(
    toys: list[ToyEngine], make_engine: Callable[..., ToyEngine], tmp_path: Path
) -> None:
    address = f"ipc://{tmp_path}/engine"
    mortal = make_engine(serve=True, bind=address)
    with WeightPublisher([toys[0].address, address], timeout_s=10.0) as publisher:
        publisher.publish(weights(1.0))
        mortal.close()
        with pytest.raises(EngineDiedError):
            publisher.publish(weights(2.0))
        serve(toys[:1], 1.0, 1)
        successor = make_engine(serve=True, bind=address)
        with pytest.raises(StaleVersionError, match=r"engine 1 .*: 0, expected one"):
            publisher.publish({"norm.weight": weights(3.0)["norm.weight"]}, strict=False)
        publisher.publish(weights(3.0))
        serve([toys[0], successor], 3.0, 2)


def test_one_that_dies_under_an_update_before_the_vote_keeps_it_from_all(
    publisher: WeightPublisher, toys: list[ToyEngine]
) -> None:
    publisher.publish(weights(1.0))
    publisher.begin()
    publisher.send(weights(2.0))
    toys[2].close()
    with pytest.raises(EngineDiedError):
        publisher.commit()
    serve(toys[:2], 1.0, 1)


def test_one_that_is_late_with_its_vote_keeps_it_from_all(
    publisher: WeightPublisher, toys: list[ToyEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher.publish(weights(1.0))
    go_on, prepare = threading.Event(), toys[1].receiver.prepare

    def late(session_id: str, epoch: int) -> Any:
        assert go_on.wait(30)
        return prepare(session_id, epoch)

    monkeypatch.setattr(toys[1].receiver, "prepare", late)
    # Either it did not answer in time, or its connection said so first.
    with pytest.raises(DeadlineExceeded, match="engine 1"):
        publisher.publish(weights(2.0), timeout_s=8.0)
    go_on.set()
    monkeypatch.undo()
    serve(toys, 1.0, 1)
    publisher.publish(weights(3.0))
    serve(toys, 3.0, 2)


def test_one_that_is_late_with_its_commit_comes_to_it(
    publisher: WeightPublisher, toys: list[ToyEngine]
) -> None:
    publisher.publish(weights(1.0))
    toys[1].host.blocked.set()
    with pytest.raises(DeadlineExceeded, match="engine 1 did not answer") as caught:
        publisher.publish(weights(2.0), timeout_s=6.0)
    assert "engine 1 serves it when it goes on" in "\n".join(caught.value.__notes__)
    serve([toys[0], toys[2]], 2.0, 2)
    assert toys[1].values() == {1.0}
    toys[1].host.blocked.clear()
    assert eventually(lambda: toys[1].receiver.version == 2, 20.0)
    serve(toys, 2.0, 2)
    publisher.publish(weights(3.0))
    serve(toys, 3.0, 3)


def test_one_that_fails_in_its_commit_is_named_and_the_next_update_brings_it_back(
    publisher: WeightPublisher, toys: list[ToyEngine]
) -> None:
    publisher.publish(weights(1.0))
    toys[1].host.fail_in = "between_steps"
    with pytest.raises(WeightUpdateError) as caught:
        publisher.publish(weights(2.0))
    assert "committed by engine 0" in "\n".join(caught.value.__notes__)
    assert toys[1].values() == {1.0}
    publisher.publish(weights(3.0))
    serve(toys, 3.0, 3)


def test_engines_of_different_versions_take_a_whole_update_and_no_part(
    publisher: WeightPublisher, toys: list[ToyEngine]
) -> None:
    with WeightPublisher(toys[0].address) as lone:
        lone.publish(weights(1.0), version=7)
    part = {"norm.weight": weights(2.0)["norm.weight"]}
    with pytest.raises(StaleVersionError, match=r"got engine 0 .*: 7, engine 1: 0"):
        publisher.publish(part, strict=False)
    with pytest.raises(StaleVersionError, match="versions only grow"):
        publisher.publish(weights(2.0), version=5)
    assert [toy.receiver.version for toy in toys] == [7, 0, 0]
    publisher.publish(weights(2.0))
    serve(toys, 2.0, 8)
    for toy in toys:
        toy.host.look_away()  # A part of it has another value, on purpose.
    assert publisher.publish(part, strict=False).version == 9


def test_bad_tensors_are_refused_before_anybody_is_asked(
    publisher: WeightPublisher, toys: list[ToyEngine]
) -> None:
    with pytest.raises(ManifestMismatch, match="missing"):
        publisher.publish({"norm.weight": weights(1.0)["norm.weight"]})
    serve(toys, 0.0, 0)


def test_no_engine_is_no_target() -> None:
    with pytest.raises(ValueError, match="got none"):
        WeightPublisher([])


def fronts() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "engines-front"]


@pytest.mark.parametrize("how", ["close", "drop"])
def test_nothing_is_left_of_a_publisher_that_goes(toys: list[ToyEngine], how: str) -> None:
    publisher = WeightPublisher([toy.address for toy in toys])
    publisher.publish(weights(1.0))
    assert len(fronts()) == 1
    if how == "close":
        publisher.close()
    else:
        del publisher
        gc.collect()
    assert eventually(lambda: not fronts())
    assert eventually(lambda: all(not toy.receiver._arenas.ids() for toy in toys))


def test_an_engine_that_hangs_does_not_hold_up_the_end(toys: list[ToyEngine]) -> None:
    publisher = WeightPublisher([toy.address for toy in toys])
    publisher.publish(weights(1.0))
    toys[1].host.blocked.set()
    try:
        with pytest.raises(DeadlineExceeded):
            publisher.publish(weights(2.0), timeout_s=0.5)
        publisher.close()
        assert eventually(lambda: not fronts())
    finally:
        toys[1].host.blocked.clear()


def test_engines_in_this_process_in_a_child_and_by_address_serve_one_version(
    tiny_checkpoint: Callable[..., Path], reference_model: Callable[[Path], Any]
) -> None:
    folder = tiny_checkpoint("qwen3", tie_word_embeddings=True)
    options: dict[str, Any] = {"kv_cache_bytes": 4 << 20, "num_threads": 1}
    greedy = {"temperature": 0.0, "max_new_tokens": 6, "ignore_eos": True}
    model = reference_model(folder)
    changed = {name: value * 1.5 for name, value in model.named_parameters()}
    with (
        Engine(folder, **options) as here,
        Engine(folder, executor="local", tp_size=2, **options) as child,
        Engine(folder, executor="local", **options) as other,
        WeightPublisher([here, child, other.address]) as publisher,
    ):
        report = publisher.publish(changed, label="three")
        engines = [here, child, other]
        assert [engine.get_weight_version() for engine in engines] == ["three"] * 3
        assert [engine.version for engine in engines] == [report.version] * 3
        expected = weight_sync.fingerprint(changed)
        assert [engine.weights_fingerprint() for engine in engines] == [expected] * 3
        outputs = [
            engine.generate(input_ids=[5, 9, 2], sampling_params=greedy)["output_ids"]
            for engine in engines
        ]
        assert outputs[0] == outputs[1] == outputs[2]
