"""The stage of a rank whose weights come over a group: its own shard and two receive buffers, never the whole model."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sync_support import ToyEngine, eventually, one_by_one, toy_map, weights

import weight_sync
from rollout.models.build import build_model
from rollout.models.model_config import ModelConfig
from weight_sync import WeightPublisher
from weight_sync.errors import FingerprintMismatch, TornWeightsError, TransportError
from weight_sync.layout.fingerprints import ArenaFingerprints
from weight_sync.layout.manifest import Manifest
from weight_sync.layout.weight_map import WeightMap
from weight_sync.plan.plan import Plan, compile_plan
from weight_sync.process_groups.parts import receive_buffer
from weight_sync.publisher.update import Update
from weight_sync.staging.shadow_stage import ShadowStage, StageMemory
from weight_sync.transports.chunks import chunks_of, ranges_of

CHUNK_BYTES = 20_000
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models in as many pieces as large ones."""
    monkeypatch.setattr("weight_sync.transports.chunks.CHUNK_BYTES", CHUNK_BYTES)
    monkeypatch.setattr("weight_sync.transports.chunks.PART_BYTES", 7_000)


class Wire:
    """A group's receiving end whose messages are the ranges of an arena, in the order of the trainer's broadcasts."""

    def __init__(self, arena: torch.Tensor, manifest: Manifest) -> None:
        self._arena, self._manifest = arena, manifest
        self._coming: list[tuple[int, int]] = []
        self.posted: list[torch.Tensor] = []
        self.fail_at = -1
        self.device = CPU
        self.destroyed = False

    def destroy(self, *, wait_s: float) -> None:
        self.destroyed = True

    def keep_until_left(self, memory: object) -> None:
        """Nothing is under way."""

    def landing(self, num_bytes: int) -> None:
        """It takes any memory."""

    def announce(self, rows: np.ndarray) -> None:
        self._coming += ranges_of(self._manifest, rows)

    def receive_into(
        self, buffer: torch.Tensor, ranges: Sequence[tuple[int, int]], *, timeout_s: float
    ) -> Future[None]:
        done: Future[None] = Future()
        if len(self.posted) == self.fail_at:
            done.set_exception(TransportError("the wire broke on purpose"))
            return done
        for start, stop in ranges:
            first, last = self._coming.pop(0)
            assert stop - start == last - first, "both ends cut alike"
            buffer[start:stop] = self._arena[first:last]
        self.posted.append(buffer)
        done.set_result(None)
        return done


class Rank:
    """One rank's model, a trainer's arena of random bytes, and the way from one to the other."""

    def __init__(self, weight_map: WeightMap) -> None:
        self.weight_map = weight_map
        self.manifest = Manifest(tensors=weight_map.metas(), bucket_bytes=1 << 20)
        self.plan: Plan = compile_plan(self.manifest, weight_map)
        generator = torch.Generator().manual_seed(5)
        size = (self.manifest.arena_bytes,)
        self.arena = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
        self.values = ArenaFingerprints(self.manifest).values(self.arena).numpy().view(np.uint64)
        self.wire = Wire(self.arena, self.manifest)
        self.memory = StageMemory(weight_map, CPU)
        self.memory.hold()

    @property
    def all_rows(self) -> np.ndarray:
        return np.arange(len(self.manifest.tensors), dtype=np.uint32)

    def stage(self) -> ShadowStage:
        wire: Any = self.wire
        return ShadowStage(self.memory, wire, self.manifest.arena_bytes, self.plan)

    def check(self, rows: np.ndarray, values: np.ndarray) -> None:
        assert (values == self.values[rows]).all()

    def accept(self, stage: ShadowStage, rows: np.ndarray, check: Any = None) -> None:
        self.wire.announce(rows)
        stage.accept(rows, check or self.check, 5.0)

    def bytes(self) -> dict[str, torch.Tensor]:
        parameters = self.weight_map.parameters.items()
        return {name: _raw(tensor).clone() for name, tensor in parameters}

    def fill(self, value: int) -> None:
        for parameter in self.weight_map.parameters.values():
            if parameter.numel():
                parameter.data.fill_(value)

    def chunk_bytes(self, rows: np.ndarray) -> int:
        sizes = [
            sum(stop - start for start, stop in ranges_of(self.manifest, chunk))
            for chunk in chunks_of(self.manifest, rows)
        ]
        return max(sizes)


def _raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


LAYOUTS = {
    "one rank": ("llama", {"tie_word_embeddings": False}, 1),
    "biases over two": ("llama", {"attention_bias": True, "mlp_bias": True}, 2),
    "padded vocabulary over two": ("llama", {"vocab_size": 289}, 2),
    "tied and padded over four": (
        "qwen3",
        {"head_dim": 32, "tie_word_embeddings": True, "vocab_size": 290},
        4,
    ),
    "two kv heads over four": ("qwen2", {}, 4),
}


@pytest.fixture(params=["toy", *LAYOUTS])
def make_maps(
    request: pytest.FixtureRequest, tiny_checkpoint: Callable[..., Path]
) -> Callable[..., list[WeightMap]]:
    """The weight maps of all ranks of a layout; "toy" has every kind of tensor, some of them strided."""

    def make(dtype: torch.dtype = torch.float32) -> list[WeightMap]:
        if request.param == "toy":
            return [toy_map()]
        family, overrides, size = LAYOUTS[request.param]
        config = ModelConfig.from_folder(tiny_checkpoint(family, **overrides))
        groups: list[Any] = [SimpleNamespace(rank=rank, size=size) for rank in range(size)]
        return [build_model(config, dtype, "cpu", group).weight_map for group in groups]

    return make


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_is_bit_for_bit_what_the_plan_writes_from_the_whole_arena(
    make_maps: Callable[..., list[WeightMap]], dtype: torch.dtype
) -> None:
    for weight_map in make_maps(dtype):
        rank = Rank(weight_map)
        rank.fill(0)
        rank.plan.replay(rank.arena)
        direct = rank.bytes()
        rank.fill(7)
        before = rank.bytes()
        stage = rank.stage()
        for rows in np.array_split(rank.all_rows, 3):
            rank.accept(stage, rows)
        assert same(rank.bytes(), before), "nothing is written before the commit"
        stage.write(None)
        assert same(rank.bytes(), direct)


def test_any_part_is_written_and_nothing_else(make_maps: Callable[..., list[WeightMap]]) -> None:
    choose = np.random.default_rng(3)
    for weight_map in make_maps():
        rank = Rank(weight_map)
        for _ in range(4):
            rows = np.flatnonzero(choose.random(len(rank.all_rows)) < 0.4)
            rank.fill(1)
            rank.plan.replay(rank.arena, rows)
            direct = rank.bytes()
            rank.fill(1)
            stage = rank.stage()
            rank.accept(stage, choose.permutation(rows))
            stage.write(rows)
            stage.release()
            assert same(rank.bytes(), direct)


@pytest.mark.parametrize(
    ("sent", "held"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)]
)
def test_tensors_of_another_dtype_are_cast_on_their_way_in(
    make_maps: Callable[..., list[WeightMap]], sent: torch.dtype, held: torch.dtype
) -> None:
    for weight_map in make_maps(held):
        rank = Rank(weight_map)
        torch.manual_seed(1)
        sources = {
            i: torch.randn(meta.shape).to(sent) for i, meta in enumerate(rank.manifest.tensors)
        }
        packed = torch.zeros(rank.manifest.arena_bytes, dtype=torch.uint8)
        for i, view in enumerate(rank.manifest.views(packed)):
            view.copy_(sources[i])
        rank.plan.replay(packed)
        direct = rank.bytes()
        rank.fill(3)
        stage = rank.stage()
        values = stage.put(sources)
        expected = ArenaFingerprints(rank.manifest).values(packed).numpy().view(np.uint64)
        assert (values == expected).all()
        stage.write(None)
        assert same(rank.bytes(), direct)


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_a_rank_of_two_holds_its_shard_and_two_chunks_and_not_the_model(
    tiny_checkpoint: Callable[..., Path],
) -> None:
    folder = tiny_checkpoint("llama", hidden_size=256, tie_word_embeddings=False)
    config = ModelConfig.from_folder(folder)
    whole = 0
    for number in range(2):
        group: Any = SimpleNamespace(rank=number, size=2)
        model = build_model(config, torch.bfloat16, "cpu", group)
        rank = Rank(model.weight_map)
        stage = rank.stage()
        for rows in np.array_split(rank.all_rows, 4):
            rank.accept(stage, rows)
        shard = sum(_raw(p).numel() for p in model.weight_map.parameters.values())
        whole = rank.manifest.arena_bytes
        padding = 256 * (len(model.weight_map.parameters) + 2)
        assert rank.memory.num_bytes <= shard + padding + 2 * rank.chunk_bytes(rank.all_rows)
        assert shard < 0.53 * whole  # norms are on both ranks
        assert rank.memory.num_bytes < 0.85 * whole
        assert len({buffer.data_ptr() for buffer in rank.wire.posted}) > 2
    assert whole > 20 * CHUNK_BYTES


def test_one_rank_whose_memory_is_laid_out_like_the_arena_needs_no_receive_buffer(
    tiny_checkpoint: Callable[..., Path],
) -> None:
    config = ModelConfig.from_folder(tiny_checkpoint("llama", tie_word_embeddings=False))
    rank = Rank(build_model(config, torch.float32, "cpu").weight_map)
    held = rank.memory.num_bytes
    rank.accept(rank.stage(), rank.all_rows)
    assert rank.memory.num_bytes == held < 1.02 * rank.manifest.arena_bytes
    assert len(rank.wire.posted) > 5


def test_memory_is_kept_from_update_to_update_and_given_back_with_its_last_holder() -> None:
    rank = Rank(toy_map())
    rank.memory.hold()
    for _ in range(3):
        stage = rank.stage()
        rank.accept(stage, rank.all_rows)
        stage.release()
    assert len({buffer.data_ptr() for buffer in rank.wire.posted}) <= 2
    landed_now: Future[None] = Future()
    landed_now.set_result(None)
    landed = [rank.stage().receive(size, lambda _: landed_now).data_ptr() for size in (100, 90)]
    assert landed[0] == landed[1], "plain trainers' calls land in the same buffer"
    shadow = weakref.ref(rank.memory._shadow)  # type: ignore[arg-type]
    rank.memory.let_go()
    assert rank.memory.num_bytes > 0
    rank.memory.let_go()
    gc.collect()
    assert rank.memory.num_bytes == 0 and shadow() is None


def test_memory_that_a_broken_group_may_still_write_is_never_used_again() -> None:
    rank = Rank(toy_map())
    stage = rank.stage()
    rank.wire.fail_at = 0
    with pytest.raises(TransportError, match="on purpose"):
        rank.accept(stage, rank.all_rows)
    shadow = rank.memory._shadow
    stage.release()
    assert rank.memory.num_bytes == 0
    rank.wire = Wire(rank.arena, rank.manifest)
    again = rank.stage()
    rank.accept(again, rank.all_rows)
    again.write(None)
    assert rank.memory._shadow is not shadow
    assert (rank.plan.resident_fingerprints().numpy().view(np.uint64) == rank.values).all()


# ---- double buffering, and what a check finds ------------------------------------------------------------------------


def test_a_chunk_arrives_while_the_one_before_it_is_checked_in_another_buffer(
    tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weight_sync.staging.shadow_plan.Chunk._find_home", lambda *_: None)
    config = ModelConfig.from_folder(tiny_checkpoint("llama", tie_word_embeddings=False))
    rank = Rank(build_model(config, torch.float32, "cpu").weight_map)
    seen: list[tuple[int, int]] = []

    def check(rows: np.ndarray, values: np.ndarray) -> None:
        rank.check(rows, values)
        seen.append((len(seen), len(rank.wire.posted)))

    rank.accept(rank.stage(), rank.all_rows, check)
    total = len(rank.wire.posted)
    assert total > 5
    assert seen == [(i, min(i + 2, total)) for i in range(total)]
    starts = [buffer.data_ptr() for buffer in rank.wire.posted]
    assert all(one != other for one, other in itertools.pairwise(starts))


def test_what_follows_a_wrong_chunk_is_received_and_not_taken() -> None:
    rank = Rank(toy_map())
    rank.fill(2)
    before = rank.bytes()
    stage = rank.stage()
    checked: list[int] = []

    def check(rows: np.ndarray, values: np.ndarray) -> None:
        checked.append(len(rows))
        raise FingerprintMismatch("wrong on purpose")

    rank.wire.announce(rank.all_rows)
    with pytest.raises(FingerprintMismatch):
        stage.accept(rank.all_rows, check, 5.0)
    assert len(checked) == 1 and rank.wire._coming == []
    assert same(rank.bytes(), before)
    held = rank.memory._shadow
    stage.release()  # the group is in step: its memory serves the next session
    rank.accept(rank.stage(), rank.all_rows)
    assert rank.memory._shadow is held


# ---- through a publisher ---------------------------------------------------------------------------------------------


@pytest.fixture
def make_publisher(
    make_engine: Callable[..., ToyEngine],
) -> Iterator[Callable[..., tuple[ToyEngine, WeightPublisher]]]:
    made: list[WeightPublisher] = []

    def make(**options: Any) -> tuple[ToyEngine, WeightPublisher]:
        engine = make_engine(**options)
        made.append(
            WeightPublisher(engine, transport="process_group", bucket_bytes=300, timeout_s=20)
        )
        return engine, made[-1]

    yield make
    for publisher in made:
        publisher.close()


def test_a_wrong_fingerprint_in_the_second_bucket_leaves_everything_as_it_was(
    make_publisher: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, publisher = make_publisher()
    publisher.publish(weights(1.0))
    finish, buckets = Update.finish, []

    def lie(self: Update, rows: list[int]) -> Any:
        packed = finish(self, rows)
        buckets.append(rows)
        if len(buckets) == 2:
            packed.fingerprints[0] ^= 1
        return packed

    monkeypatch.setattr(Update, "finish", lie)
    first, second, *_ = weights(2.0).items()
    publisher.begin()
    publisher.send([first])
    with pytest.raises(FingerprintMismatch, match="staged bytes of 1 tensors"):
        publisher.send([second])
    assert engine.values() == {1.0} and engine.receiver.version == 1
    publisher.abort()
    assert publisher.publish(weights(3.0)).version == 2
    assert engine.values() == {3.0}
    assert publisher.fingerprint() == weight_sync.fingerprint(weights(3.0))


def test_an_aborted_session_leaves_the_parameters_and_closing_gives_the_memory_back(
    make_publisher: Callable[..., Any],
) -> None:
    engine, publisher = make_publisher()
    memory = engine.receiver.stage_memory
    assert memory.num_bytes == 0
    publisher.publish(weights(1.0))
    held = memory.num_bytes
    assert held > 0
    publisher.begin()
    publisher.send(weights(2.0))
    publisher.abort()
    assert engine.values() == {1.0} and memory.num_bytes == held
    publisher.close()
    assert eventually(lambda: memory.num_bytes == 0)


def test_a_commit_that_fails_rolls_back_from_the_copy(make_publisher: Callable[..., Any]) -> None:
    engine, publisher = make_publisher(keep_previous=True)
    publisher.publish(weights(1.0))
    engine.host.fail_in = "weights_written"
    with pytest.raises(weight_sync.WeightUpdateError, match="version 1 was restored"):
        publisher.publish(weights(2.0))
    assert engine.values() == {1.0}
    publisher.publish(one_by_one(weights(3.0)))
    assert engine.values() == {3.0}


def test_torn_weights_are_repaired_by_parts_under_one_label(
    make_publisher: Callable[..., Any],
) -> None:
    engine, publisher = make_publisher()
    publisher.publish(weights(1.0))
    engine.host.fail_in = "weights_written"
    with pytest.raises(TornWeightsError):
        publisher.publish(weights(2.0))
    named = list(weights(4.0).items())
    publisher.publish(dict(named[:4]), strict=False, label="four")
    assert engine.receiver.torn is not None
    report = publisher.publish(dict(named[4:]), strict=False, label="four")
    assert engine.receiver.torn is None and engine.values() == {4.0}
    assert report.fingerprint == weight_sync.fingerprint(weights(4.0))


def test_updates_after_a_refused_bucket_get_their_own_bytes(
    make_publisher: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The buckets behind the refused one are under way already; nobody may take them for those of the next update."""
    engine, publisher = make_publisher()
    publisher.publish(weights(1.0))
    finish, packed_buckets = Update.finish, itertools.count()

    def lie(self: Update, rows: list[int]) -> Any:
        packed = finish(self, rows)
        if next(packed_buckets) == 0:
            packed.fingerprints[0] ^= 1
        return packed

    with monkeypatch.context() as patch:
        patch.setattr(Update, "finish", lie)
        with pytest.raises(FingerprintMismatch):
            publisher.publish(weights(2.0))
    assert next(packed_buckets) > 3 and engine.values() == {1.0}
    for value in (3.0, 4.0, 5.0):
        publisher.publish(weights(value))
        assert engine.values() == {value}


def test_no_memory_for_a_receive_buffer_is_an_error_and_the_next_update_works(
    make_engine: Callable[..., ToyEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weight_sync.transports.chunks.CHUNK_BYTES", 2_000)
    monkeypatch.setattr("weight_sync.transports.chunks.PART_BYTES", 700)
    engine = make_engine()
    calls = itertools.count()

    def scarce(num_bytes: int) -> torch.Tensor:
        if next(calls) == 1:
            raise torch.OutOfMemoryError("nothing is left")
        return receive_buffer(num_bytes)

    with WeightPublisher(engine, transport="process_group", timeout_s=20) as publisher:
        publisher.publish(weights(1.0))
        with monkeypatch.context() as patch:
            patch.setattr("weight_sync.staging.shadow_stage.receive_buffer", scarce)
            engine.receiver.stage_memory._incoming.clear()
            with pytest.raises(TransportError, match="no memory on cpu"):
                publisher.publish(weights(2.0))
        assert engine.values() == {1.0}
        for value in (3.0, 4.0):
            publisher.publish(weights(value))
            assert engine.values() == {value}
