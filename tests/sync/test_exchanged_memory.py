"""A whole update that waits beside mapped parameters is exchanged with them: nothing is copied, and the old version is
still there. Pages of the process stand in for a GPU's memory, but where the test is marked gpu."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from mapped_pages import Pages
from process_group_support import NAME, Peer, join
from sync_support import ToyEngine, eventually, toy_map, weights

import weight_sync
from weight_sync import FingerprintMismatch, TornWeightsError, WeightPublisher, WeightUpdateError
from weight_sync.devices.mapped_memory import MappedMemory
from weight_sync.errors import TransportError
from weight_sync.layout.manifest import Manifest, align
from weight_sync.layout.weight_map import Placement, WeightMap
from weight_sync.plan.plan import compile_plan
from weight_sync.staging import shadow
from weight_sync.staging.shadow import Shadow, ShadowWrite
from weight_sync.staging.shadow_plan import ShadowPlan
from weight_sync.staging.shadow_stage import ShadowStage, StageMemory
from weight_sync.staging.stage_memories import NoMemory

CPU = torch.device("cpu")
Made = tuple[ToyEngine, WeightPublisher]


@pytest.fixture(autouse=True)
def even_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shadow, "_SWAPPED_BYTES", 0)


@pytest.fixture
def pages() -> Pages:
    return Pages()


@pytest.fixture
def made(make_engine: Callable[..., ToyEngine], pages: Pages) -> Iterator[Made]:
    """An engine over pages at version 1, all ones, and a publisher whose bytes wait in a stage of the engine's."""
    engine = make_engine(driver=pages)
    publisher = WeightPublisher(engine, transport="process_group", timeout_s=20)
    publisher.publish(weights(1.0))
    yield engine, publisher
    publisher.close()


def flip_after_writing(engine: ToyEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next write is damaged behind its back."""
    write = ShadowPlan.write

    def damaged(self: ShadowPlan, rows: Any) -> None:
        monkeypatch.undo()
        monkeypatch.setattr(shadow, "_SWAPPED_BYTES", 0)
        write(self, rows)
        engine.weight_map.parameters["norm.weight"].view(torch.uint8)[3] ^= 64

    monkeypatch.setattr(ShadowPlan, "write", damaged)


def test_whole_updates_are_exchanged_and_parts_are_copied(made: Made, pages: Pages) -> None:
    engine, publisher = made
    addresses, swaps = engine.addresses, pages.swaps
    assert swaps == 1
    for version in (2.0, 3.0):
        report = publisher.publish(weights(version))
        assert report.fingerprint == weight_sync.fingerprint(weights(version))
        assert engine.values() == {version} and engine.addresses == addresses
    assert pages.swaps == swaps + 2
    publisher.publish({"norm.weight": weights(3.0)["norm.weight"]}, strict=False)
    # What the shadow holds of an older version comes back nowhere.
    assert pages.swaps == swaps + 2 and engine.values() == {3.0}
    publisher.publish(weights(4.0))
    assert engine.values() == {4.0} and engine.host.mixtures == []


@pytest.mark.parametrize("verify", ["pause", "overlapped"])
def test_a_write_that_is_not_what_was_sent_leaves_the_old_version_without_a_kept_copy(
    made: Made, monkeypatch: pytest.MonkeyPatch, verify: Any
) -> None:
    engine, publisher = made
    engine.host.looks = verify != "overlapped"
    flip_after_writing(engine, monkeypatch)
    with pytest.raises(FingerprintMismatch, match="version 1 was restored and serves"):
        publisher.publish(weights(2.0), verify=verify)
    assert engine.values() == {1.0} and engine.receiver.torn is None
    assert publisher.fingerprint() == weight_sync.fingerprint(weights(1.0))
    assert publisher.publish(weights(3.0)).version == 2
    assert engine.values() == {3.0}


def test_a_host_that_fails_behind_the_exchange_goes_back(made: Made) -> None:
    engine, publisher = made
    engine.host.fail_in = "weights_written"
    with pytest.raises(WeightUpdateError, match="version 1 was restored and serves"):
        publisher.publish(weights(2.0))
    assert engine.values() == {1.0} and engine.receiver.torn is None


def test_a_driver_that_cannot_exchange_changes_nothing(
    made: Made, pages: Pages, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, publisher = made

    def refuse(*_: int) -> None:
        raise TransportError("cuMemMap failed on purpose")

    with monkeypatch.context() as patch:
        patch.setattr(pages, "swap", refuse)
        with pytest.raises(TransportError, match="version 1 was restored and serves"):
            publisher.publish(weights(2.0))
    assert engine.values() == {1.0} and engine.receiver.torn is None
    publisher.publish(weights(3.0))
    assert engine.values() == {3.0}


class FailsIn:
    """`named` of a host that cannot begin what has that name."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, name: str) -> AbstractContextManager[None]:
        if name == self.name:
            raise RuntimeError(f"{name} broke on purpose")
        return nullcontext()


@pytest.mark.parametrize("transport", ["process_group", "local"])
def test_what_fails_before_a_byte_is_written_undoes_no_older_exchange(
    make_engine: Callable[..., ToyEngine], pages: Pages, transport: Any
) -> None:
    """The shadow holds what waits to be written by then, not what was resident before."""
    engine = make_engine(driver=pages)
    with WeightPublisher(engine, transport=transport, timeout_s=20) as publisher:
        for version in (1.0, 2.0):
            publisher.publish(weights(version))
        engine.host.named = FailsIn("commit")  # type: ignore[method-assign]
        with pytest.raises(WeightUpdateError, match="version 2 was restored and serves"):
            publisher.publish(weights(3.0))
        engine.host.named = nullcontext  # type: ignore[method-assign]
        assert engine.values() == {2.0} and engine.receiver.torn is None
        publisher.publish(weights(4.0))
    assert engine.values() == {4.0}


def test_a_write_that_cannot_be_worked_out_undoes_no_older_exchange(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, publisher = made
    publisher.publish(weights(2.0))
    part = {"norm.weight": weights(3.0)["norm.weight"]}

    def refuse(*_: object) -> None:
        raise RuntimeError("broken on purpose")

    with monkeypatch.context() as patch:
        patch.setattr(Shadow, "write", refuse)
        with pytest.raises(WeightUpdateError, match="version 2 was restored and serves"):
            publisher.publish(part, strict=False)
    assert engine.values() == {2.0} and engine.receiver.torn is None


def test_after_a_part_there_is_no_way_back(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its bytes were copied over the old ones."""
    engine, publisher = made
    flip_after_writing(engine, monkeypatch)
    with pytest.raises(TornWeightsError, match="no copy of the previous version"):
        publisher.publish({"norm.weight": weights(2.0)["norm.weight"]}, strict=False)
    publisher.publish(weights(3.0))
    assert engine.values() == {3.0} and engine.receiver.torn is None


def test_the_shadow_goes_with_its_last_holder(made: Made, pages: Pages) -> None:
    engine, publisher = made
    assert pages.reserved == 2
    publisher.close()
    gc.collect()
    assert pages.reserved == 1 and len(pages.mapped) == 1
    with WeightPublisher(engine, transport="process_group", timeout_s=20) as another:
        another.publish(weights(5.0))
    assert engine.values() == {5.0}


def test_where_there_is_no_memory_for_it_the_trainer_is_told(
    make_engine: Callable[..., ToyEngine], pages: Pages
) -> None:
    engine = make_engine(driver=pages)
    pages.full = True
    with pytest.raises(TransportError, match="no memory on cpu to stage an update"):
        WeightPublisher(engine, transport="process_group", timeout_s=20).publish(weights(1.0))
    assert pages.reserved == 1 and engine.values() == {0.0}


def test_a_shadow_that_has_no_room_leaves_nothing_to_whoever_keeps_the_error(
    pages: Pages, monkeypatch: pytest.MonkeyPatch
) -> None:
    memories = {name: MappedMemory(512, CPU, pages) for name in "ab"}
    parameters = {name: memory.tensor for name, memory in memories.items()}
    known = WeightMap([Placement.whole(n, p) for n, p in parameters.items()], parameters)
    take = pages.map

    def one_more(address: int, num_bytes: int) -> None:
        pages.full = pages.reserved == 4
        take(address, num_bytes)

    monkeypatch.setattr(pages, "map", one_more)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    with pytest.raises(torch.OutOfMemoryError) as kept:
        Shadow(known)
    assert pages.reserved == len(pages.mapped) == 2, kept


def test_a_shadow_stays_while_a_group_that_was_left_may_write_into_it(
    peers: Callable[[int], list[Peer]], pages: Pages
) -> None:
    """gloo cannot be told to stop, and what it writes into is a view, which keeps no mapping."""
    known = toy_map(driver=pages)
    plan = compile_plan(Manifest(tensors=known.metas(), bucket_bytes=1 << 20), known)
    memory = StageMemory(known, CPU)
    memory.hold()
    [trainer] = peers(1)
    port = trainer.do("serve", world_size=2, group_name=NAME)
    with join(port) as group:
        group.joined.result(20)
        stage = ShadowStage(memory, group, plan.manifest.arena_bytes, plan)
        memory.wait = lambda future: future.result(0.2)
        with pytest.raises(TimeoutError):
            stage.accept(np.arange(len(plan.manifest.tensors)), lambda *_: None, timeout_s=4.0)
        stage.release()
        del stage
        memory.let_go()
        gc.collect()
        assert any(thread.name == f"update-group-{NAME}-calls" for thread in threading.enumerate())
        assert pages.reserved == len(pages.mapped) == 2
        assert eventually(lambda: pages.reserved == len(pages.mapped) == 1)
    trainer.do("destroy")


# ---- what is exchanged -----------------------------------------------------------------------------------------------


def shadow_of(parameters: dict[str, torch.Tensor]) -> tuple[Shadow, ShadowWrite]:
    """Of a model of these, and what writes all of them."""
    known = WeightMap([Placement.whole(n, p) for n, p in parameters.items()], parameters)
    held = Shadow(known)
    return held, held.write(parameters.values())


def fill(held: Shadow, parameters: dict[str, torch.Tensor], value: int) -> None:
    """An update that waits."""
    for parameter in parameters.values():
        held.of(parameter).fill_(value)


def map_of(memory: torch.Tensor, sizes: list[int], named: list[int], at: int = 0) -> WeightMap:
    """Parameters of `sizes` bytes one behind the other from byte `at` of `memory`; the model has those `named`."""
    parameters = {}
    for i, size in enumerate(sizes):
        if i in named:
            parameters[f"p{i}"] = memory[at : at + size]
        at += align(size)
    return WeightMap([Placement.whole(name, p) for name, p in parameters.items()], parameters)


@pytest.mark.parametrize(
    ("sizes", "named", "spare", "at", "exchanged"),
    [
        ([1000, 100, 256], [0, 1, 2], 0, 0, True),
        ([1000, 100, 256], [0, 1, 2], 256, 0, True),
        ([1000, 100, 256], [0, 1, 2], 256, 128, True),
        ([1000, 100, 256], [0, 2], 0, 0, False),
        ([1000, 4, 256], [0, 2], 0, 0, False),
        ([1024, 4, 256], [0, 2], 0, 0, False),
        ([4, 1000], [1], 0, 0, False),
        ([1024, 4], [0], 256, 0, False),
        ([1000, 256], [0], 256, 0, False),
    ],
)
def test_memory_is_exchanged_where_the_model_has_all_of_it(
    pages: Pages, sizes: list[int], named: list[int], spare: int, at: int, exchanged: bool
) -> None:
    memory = MappedMemory(sum(map(align, sizes)) + spare, CPU, pages)
    known = map_of(memory.tensor, sizes, named, at)
    held = Shadow(known)
    write = held.write(known.parameters.values())
    assert bool(write.swaps) == exchanged and bool(write.targets) != exchanged
    memory.tensor.fill_(1)
    for parameter in known.parameters.values():
        held.of(parameter).fill_(2)
    write.run()
    for parameter in known.parameters.values():
        assert set(parameter.tolist()) == {2}
    if not exchanged:  # what others have there stays
        assert int((memory.tensor == 2).sum()) == sum(sizes[i] for i in named)
        assert not write.reversible
        return
    write.take_back()
    assert set(memory.tensor.tolist()) == {1}
    # A tensor less is no whole update.
    some = held.write(list(known.parameters.values())[1:])
    assert not some.swaps and some.targets


def test_an_exchange_that_stops_between_two_allocations_is_taken_back(
    pages: Pages, monkeypatch: pytest.MonkeyPatch
) -> None:
    memories = {name: MappedMemory(512, CPU, pages) for name in "abc"}
    parameters = {name: memory.tensor.fill_(1) for name, memory in memories.items()}
    held, write = shadow_of(parameters)
    swap = pages.swap

    def two(*arguments: int) -> None:
        if pages.swaps == 2:
            raise TransportError("cuMemMap failed on purpose")
        swap(*arguments)

    fill(held, parameters, 2)
    with monkeypatch.context() as patch:
        patch.setattr(pages, "swap", two)
        with pytest.raises(TransportError, match="on purpose"):
            write.run()
    assert sorted(int(p[0]) for p in parameters.values()) == [1, 2, 2]
    assert write.reversible
    write.take_back()
    assert all(set(parameter.tolist()) == {1} for parameter in parameters.values())
    write.run()
    assert all(set(parameter.tolist()) == {2} for parameter in parameters.values())


def test_memory_of_torchs_is_copied_beside_what_is_exchanged(pages: Pages) -> None:
    memory = MappedMemory(512, CPU, pages)
    parameters = {"a": memory.tensor, "b": torch.ones(300, dtype=torch.uint8)}
    held, write = shadow_of(parameters)
    fill(held, parameters, 2)
    write.run()
    assert len(write.swaps) == 1 and len(write.targets) == 1 and not write.reversible
    assert all(set(parameter.tolist()) == {2} for parameter in parameters.values())


def test_what_cannot_be_exchanged_is_taken_back_before_anything_else_is_copied(
    pages: Pages, monkeypatch: pytest.MonkeyPatch
) -> None:
    memories = [MappedMemory(512, CPU, pages) for _ in range(2)]
    parameters = {"a": memories[0].tensor, "b": memories[1].tensor, "c": torch.zeros(300)}
    held, write = shadow_of(parameters)
    fill(held, parameters, 2)
    write.run()
    assert not write.reversible
    fill(held, parameters, 3)
    swap = pages.swap

    def one(*arguments: int) -> None:
        if pages.swaps == 3:
            raise TransportError("cuMemMap failed on purpose")
        swap(*arguments)

    monkeypatch.setattr(pages, "swap", one)
    with pytest.raises(TransportError, match="on purpose"):
        write.run()
    assert write.reversible
    monkeypatch.undo()
    write.take_back()
    assert all(set(parameter.tolist()) == {2} for parameter in parameters.values())


def test_what_was_written_as_it_came_is_not_taken_back() -> None:
    known = toy_map()
    plan = compile_plan(Manifest(tensors=known.metas(), bucket_bytes=1 << 20), known)
    memory = NoMemory(known, CPU, tear=lambda: None)
    written = memory.plan(plan)
    written.write(None)
    assert not written.can_take_back()


def test_released_memory_is_not_exchanged(pages: Pages) -> None:
    one = MappedMemory(100, CPU, pages)
    other = one.another()
    one.release()
    with pytest.raises(TransportError, match="released"):
        one.swap(other)
    assert MappedMemory.behind(one.tensor[3:].view(1, -1)) is one
    one.free()
    assert MappedMemory.behind(torch.empty(3)) is None


# ---- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_a_captured_graph_reads_what_was_exchanged() -> None:
    device = torch.device("cuda", 0)
    known = toy_map("cuda:0")
    held = Shadow(known)
    parameter = known.parameters["qkv"]
    parameter.fill_(1.0)
    total = torch.zeros((), dtype=torch.float32, device=device)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        total.copy_(parameter.float().sum())
    write = held.write(known.parameters.values())
    assert write.swaps and not write.targets
    address, free = parameter.data_ptr(), torch.cuda.mem_get_info()[0]
    for version in range(2, 12):
        held.of(parameter).fill_(float(version))
        write.run()
        graph.replay()
        assert float(total) == version * parameter.numel()
    write.take_back()
    graph.replay()
    assert float(total) == 10 * parameter.numel()
    assert parameter.data_ptr() == address and torch.cuda.mem_get_info()[0] == free
    del held, write
    gc.collect()
    assert torch.cuda.mem_get_info()[0] > free
