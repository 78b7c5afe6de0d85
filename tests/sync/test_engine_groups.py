"""Weights over a process group, through `Engine`: the publisher's way, and the way of a plain trainer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_group import PlainGroup
from process_group_support import free_port
from sync_support import eventually

import weight_sync
from rollout import Engine
from weight_sync.errors import (
    DeadlineExceeded,
    FingerprintMismatch,
    ManifestMismatch,
    ProtocolError,
    SessionBusy,
    TransportError,
    WeightUpdateError,
)
from weight_sync.publisher.publisher import WeightPublisher

NAME = "updates"
GLOO: dict[str, Any] = {"transport": "process_group", "group_backend": "gloo"}


@pytest.fixture(scope="module")
def folder(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("llama", tie_word_embeddings=False)


@pytest.fixture(scope="module", params=["inline", "two ranks"])
def engine(request: pytest.FixtureRequest, folder: Path) -> Iterator[Engine]:
    two = {"executor": "local", "tp_size": 2, "num_threads": 1} if request.param != "inline" else {}
    with Engine(folder, kv_cache_bytes=1 << 20, request_timeout_s=60.0, **two) as engine:
        yield engine


@pytest.fixture
def trainer(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


class PlainTrainer:
    """Rank 0 of a group, broadcasting tensors one by one as `torch.distributed` trainers do."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.pool = ThreadPoolExecutor(1)
        self.connect()

    def connect(self) -> None:
        world = 1 + self.engine.config.tp_size
        self.group = PlainGroup.serve(world_size=world, group_name=NAME, timeout_s=120)
        self.engine.init_weights_update_group(
            "127.0.0.1", str(self.group.master_port), 1, world, NAME, "gloo"
        )
        self.group.joined.result(20)

    def update(
        self, named: list[tuple[str, torch.Tensor]], **options: Any
    ) -> weight_sync.SyncReport:
        """Tell the engine, broadcast, and wait for its answer."""
        answer = self.pool.submit(
            self.engine.update_weights_from_distributed,
            [name for name, _ in named],
            [str(tensor.dtype) for _, tensor in named],
            [list(tensor.shape) for _, tensor in named],
            NAME,
            **options,
        )
        if options.get("load_format") == "flattened_bucket":
            parts = [weight_sync.FlattenedTensorBucket(named_tensors=named).get_flattened_tensor()]
        else:
            parts = [tensor.detach().contiguous().view(-1).view(torch.uint8) for _, tensor in named]
        for part in parts:
            self.group.broadcast(part, [(0, part.numel())], timeout_s=60).result()
        return answer.result(30)

    def close(self) -> None:
        self.group.destroy()
        self.pool.shutdown()


@pytest.fixture
def plain(engine: Engine) -> Iterator[PlainTrainer]:
    plain = PlainTrainer(engine)
    yield plain
    plain.close()
    engine.destroy_weights_update_group(NAME)


def test_a_publisher_pushes_over_a_group_of_its_own(engine: Engine, trainer: Any) -> None:
    with WeightPublisher(engine, **GLOO, bucket_bytes=100_000) as publisher:
        for _ in range(3):
            with torch.no_grad():
                trainer.model.norm.weight.mul_(1.01)
            report = publisher.publish(trainer)
            assert report.transport == "process_group" and report.complete
            assert (
                engine.weights_fingerprint()
                == weight_sync.fingerprint(trainer)
                == report.fingerprint
            )
        part = publisher.publish({"model.norm.weight": trainer.model.norm.weight * 2}, strict=False)
        assert part.updated == 1


def test_a_publisher_makes_a_new_group_after_a_failure(engine: Engine, trainer: Any) -> None:
    with WeightPublisher(engine, **GLOO, timeout_s=120) as publisher:
        publisher.publish(trainer)
        publisher._endpoint._packed.arena._group.destroy()  # type: ignore[union-attr]
        publisher.publish(trainer)
    assert engine.weights_fingerprint() == weight_sync.fingerprint(trainer)


def test_a_plain_trainer_that_sends_nothing_makes_no_version_and_keeps_its_group(
    engine: Engine, plain: PlainTrainer, trainer: Any
) -> None:
    before = engine.version
    with pytest.raises(ManifestMismatch, match="got no tensors, expected at least one"):
        plain.update([])
    assert engine.version == before
    assert plain.update([("model.norm.weight", trainer.model.norm.weight)]).updated == 1


def test_a_plain_trainer_updates_tensor_by_tensor(
    engine: Engine, plain: PlainTrainer, trainer: Any
) -> None:
    report = plain.update(list(trainer.named_parameters()), weight_version=41)
    assert report.complete and engine.get_weight_version() == "41"
    assert engine.weights_fingerprint() == weight_sync.fingerprint(trainer)


def test_a_flattened_bucket_of_another_dtype_is_cast(
    engine: Engine, plain: PlainTrainer, trainer: Any
) -> None:
    half = [(name, tensor.detach().bfloat16()) for name, tensor in trainer.named_parameters()]
    report = plain.update(half, load_format="flattened_bucket")
    assert {(source, target) for _, source, target in report.casts} == {("bfloat16", "float32")}
    rounded = {name: tensor.float() for name, tensor in half}
    assert engine.weights_fingerprint() == weight_sync.fingerprint(rounded)


def test_a_session_over_a_group_commits_as_one(
    engine: Engine, plain: PlainTrainer, trainer: Any
) -> None:
    before = engine.weights_fingerprint()
    tensors = list(trainer.named_parameters())
    engine.begin_weight_update(strict=True, weight_version="whole")
    for first in range(0, len(tensors), 6):
        plain.update(tensors[first : first + 6])
        assert engine.weights_fingerprint() == before
    assert engine.end_weight_update().complete
    assert engine.weights_fingerprint() == weight_sync.fingerprint(trainer)


@pytest.mark.parametrize("group_first", [False, True])
def test_a_session_takes_tensors_from_the_caller_and_over_a_group(
    engine: Engine, plain: PlainTrainer, trainer: Any, group_first: bool
) -> None:
    tensors = list(trainer.named_parameters())
    half = len(tensors) // 2
    ways = [lambda: engine.update_weights_from_tensor(tensors[:half])]
    ways.insert(0 if group_first else 1, lambda: plain.update(tensors[half:-1]))
    before = engine.weights_fingerprint()
    engine.begin_weight_update(strict=True, weight_version="both")
    for way in ways:
        way()
    engine.update_weights_from_tensor(tensors[-1:])
    assert engine.weights_fingerprint() == before
    assert engine.end_weight_update().complete
    assert engine.weights_fingerprint() == weight_sync.fingerprint(trainer)
    engine.begin_weight_update()
    for way in ways:
        way()
    engine.abort_weight_update()
    engine.begin_weight_update()
    plain.update(tensors[:1])
    with pytest.raises(ManifestMismatch, match="more than once"):
        engine.update_weights_from_tensor(tensors[:1])
    engine.abort_weight_update()
    assert engine.weights_fingerprint() == weight_sync.fingerprint(trainer)


def test_a_refused_call_leaves_the_group_so_that_nobody_takes_its_bytes_for_the_next_ones(
    engine: Engine, trainer: Any
) -> None:
    plain = PlainTrainer(engine)
    norm = trainer.model.norm.weight.detach()
    plain.update(list(trainer.named_parameters()))
    refusals: list[tuple[type[Exception], dict[str, Any]]] = [
        (SessionBusy, {}),
        (WeightUpdateError, {"load_format": "pickle"}),
        (TypeError, {"flush_cash": True}),
    ]
    for kind, options in refusals:
        with WeightPublisher(engine) as other:
            if kind is SessionBusy:
                other.begin()
            answer = plain.pool.submit(
                engine.update_weights_from_distributed,
                *(["model.norm.weight"], ["float32"], [[64]], NAME),
                **options,
            )
            part = (norm + 5).view(torch.uint8)
            with suppress(TransportError, DeadlineExceeded):
                plain.group.broadcast(part, [(0, part.numel())], timeout_s=2).result()
            with pytest.raises(kind) as caught:
                answer.result(60)
            words = [str(caught.value), *getattr(caught.value, "__notes__", [])]
            assert any("init_weights_update_group" in text for text in words)
        with pytest.raises(TransportError, match="no update group"):
            engine.update_weights_from_distributed(["model.norm.weight"], ["float32"], [[64]], NAME)
        plain.close()
        plain = PlainTrainer(engine)
        plain.update([("model.norm.weight", norm + 6)])
        assert engine.get_weights_by_name("model.norm.weight") == pytest.approx((norm + 6).tolist())
    plain.close()


def test_calls_of_many_threads_take_their_turns(
    engine: Engine, plain: PlainTrainer, trainer: Any
) -> None:
    norm = trainer.model.norm.weight.detach()
    reports: list[Any] = []
    threads = []
    for i in range(4):
        threads.append(
            threading.Thread(
                target=lambda i=i: reports.append(
                    engine.update_weights_from_distributed(
                        ["model.norm.weight"], ["float32"], [[64]], NAME, weight_version=f"turn {i}"
                    )
                )
            )
        )
        threads[-1].start()
        # The order of the calls is the order of the broadcasts.
        assert eventually(lambda i=i: len(engine._group_updates._turns) == i + 1)
    for i in range(4):
        part = (norm + i).view(torch.uint8)
        plain.group.broadcast(part, [(0, part.numel())], timeout_s=60).result()
    for thread in threads:
        thread.join(60)
    assert [(report.updated, report.label) for report in reports] == [
        (1, f"turn {i}") for i in range(4)
    ]
    assert engine.get_weights_by_name("model.norm.weight") == pytest.approx((norm + 3).tolist())


def test_an_engine_that_waits_for_a_trainer_answers_everybody_else_and_can_be_told_to_stop(
    engine: Engine, trainer: Any
) -> None:
    plain = PlainTrainer(engine)
    waiting = plain.pool.submit(
        engine.update_weights_from_distributed, ["model.norm.weight"], ["float32"], [[64]], NAME
    )
    time.sleep(0.3)
    assert not waiting.done()
    started = time.monotonic()
    with WeightPublisher(engine, timeout_s=60) as other:
        other.engine_info()
        other.fingerprint()
        with pytest.raises(SessionBusy):
            other.publish(trainer)
    engine.abort_weight_update()
    with pytest.raises(WeightUpdateError, match="aborted"):
        waiting.result(20)
    assert time.monotonic() - started < 30
    plain.close()
    plain = PlainTrainer(engine)
    assert plain.update(list(trainer.named_parameters())).complete
    plain.close()


@pytest.mark.parametrize("wrong", ["half", "double", "one less", "one more"])
def test_a_trainer_that_sends_another_size_than_it_announced_is_refused(
    engine: Engine, trainer: Any, wrong: str
) -> None:
    before = engine.weights_fingerprint()
    plain = PlainTrainer(engine)
    norm = torch.ones(64)
    sent = {"half": norm.half(), "double": norm.double(), "one less": norm[1:]}
    part = sent.get(wrong, torch.ones(65)).view(torch.uint8)
    waiting = plain.pool.submit(
        engine.update_weights_from_distributed, ["model.norm.weight"], ["float32"], [[64]], NAME
    )
    plain.group.broadcast(part, [(0, part.numel())], timeout_s=60).result()
    with pytest.raises(TransportError, match="bytes than announced"):
        waiting.result(10)
    plain.close()
    assert engine.weights_fingerprint() == before


@pytest.mark.parametrize("load_format", [None, "flattened_bucket"])
@pytest.mark.parametrize("session", [False, True], ids=["alone", "in a session"])
def test_a_trainer_that_says_its_fingerprint_has_every_byte_compared(
    engine: Engine, trainer: Any, load_format: str | None, session: bool
) -> None:
    """What NCCL makes of a message of another length has the right length, and anything inside."""
    plain = PlainTrainer(engine)
    named = [(name, tensor.detach().bfloat16()) for name, tensor in trainer.named_parameters()]
    options: dict[str, Any] = {"load_format": load_format}
    said = weight_sync.fingerprint(named)
    assert plain.update(named, fingerprint=said, **options).complete
    before = engine.weights_fingerprint()
    if session:
        engine.begin_weight_update()
    wrong = [(name, tensor.clone()) for name, tensor in named]
    wrong[3][1].view(-1)[-1] += 1.0
    with pytest.raises(FingerprintMismatch, match=r"expected 0x[0-9a-f]+; send each"):
        plain.update(wrong, fingerprint=said, **options)
    if session:
        with pytest.raises(WeightUpdateError):
            engine.end_weight_update()
    assert engine.weights_fingerprint() == before
    with pytest.raises(TransportError, match="no update group"):
        engine.update_weights_from_distributed(["model.norm.weight"], ["float32"], [[64]], NAME)
    plain.close()
    plain = PlainTrainer(engine)
    with pytest.raises(WeightUpdateError, match="64 bits"):
        engine.update_weights_from_distributed(
            ["model.norm.weight"], ["float32"], [[64]], NAME, fingerprint=1 << 64
        )
    plain.close()
    plain = PlainTrainer(engine)
    norm = [("model.norm.weight", torch.full((64,), 5.0))]
    assert plain.update(norm, fingerprint=weight_sync.fingerprint(norm)).updated == 1
    plain.close()


@pytest.mark.parametrize("dtype", ["uint8", "int16", "bool", "int32"])
def test_a_tensor_of_integers_is_no_parameter_however_many_of_its_bytes_come(
    engine: Engine, trainer: Any, dtype: str
) -> None:
    """The marks of short messages are numbers among integers, so a few missing bytes of them do not show."""
    before = engine.weights_fingerprint()
    plain = PlainTrainer(engine)
    sent = torch.ones(63, dtype=getattr(torch, dtype)).view(torch.uint8)
    waiting = plain.pool.submit(
        engine.update_weights_from_distributed, ["model.norm.weight"], [dtype], [[64]], NAME
    )
    plain.group.broadcast(sent, [(0, sent.numel())], timeout_s=60).result()
    with pytest.raises(WeightUpdateError, match=r"model\.norm\.weight|bytes than announced"):
        waiting.result(10)
    plain.close()
    assert engine.weights_fingerprint() == before


def test_what_is_refused_is_received_first_so_the_group_stays_in_step(
    engine: Engine, plain: PlainTrainer, trainer: Any
) -> None:
    before = engine.weights_fingerprint()
    norm = trainer.model.norm.weight.detach()
    with pytest.raises(ManifestMismatch) as error:
        plain.update([("model.nrm.weight", norm), ("model.norm.weight", torch.ones(63))])
    assert "model.nrm.weight" in str(error.value) and "63" in str(error.value)
    assert engine.weights_fingerprint() == before
    assert plain.update([("model.norm.weight", norm)]).updated == 1


def test_a_trainer_that_stops_in_the_middle_costs_a_deadline_and_no_version(
    engine: Engine, trainer: Any
) -> None:
    before = engine.weights_fingerprint()
    plain = PlainTrainer(engine)
    names = ["model.norm.weight", "lm_head.weight"]
    failed: list[BaseException] = []

    def ask() -> None:
        try:
            engine.update_weights_from_distributed(
                names, ["float32"] * 2, [[64], list(trainer.lm_head.weight.shape)], NAME
            )
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    plain.group.broadcast(torch.zeros(256, dtype=torch.uint8), [(0, 256)], timeout_s=60).result()
    plain.close()
    thread.join(40)
    assert isinstance(failed[0], (DeadlineExceeded, TransportError))
    assert engine.weights_fingerprint() == before
    again = PlainTrainer(engine)  # the same name, any number of times
    again.update(list(trainer.named_parameters()))
    assert engine.weights_fingerprint() == weight_sync.fingerprint(trainer)
    again.close()


def test_a_trainer_that_never_comes_is_named_by_the_deadline_of_the_call(engine: Engine) -> None:
    port = free_port()
    started = time.monotonic()
    with pytest.raises(DeadlineExceeded, match=f"127.0.0.1:{port}"):
        engine.init_weights_update_group(
            "127.0.0.1", port, 1, 1 + engine.config.tp_size, "nobody", backend="gloo", timeout_s=0.5
        )
    assert time.monotonic() - started < 20


@pytest.mark.parametrize("size", [-64, 64 << 40], ids=["below zero", "terabytes"])
def test_sizes_that_no_model_has_are_refused_before_memory_is_made_for_them(
    engine: Engine, trainer: Any, size: int
) -> None:
    before = engine.weights_fingerprint()
    plain = PlainTrainer(engine)
    with pytest.raises((ManifestMismatch, ProtocolError)):
        engine.update_weights_from_distributed(["lm_head.weight"], ["float32"], [[size]], NAME)
    plain.close()
    assert engine.weights_fingerprint() == before
    plain = PlainTrainer(engine)
    assert plain.update(list(trainer.named_parameters())).complete
    plain.close()


def test_groups_and_formats_that_do_not_exist_are_refused_in_words(engine: Engine) -> None:
    given = ["model.norm.weight"], ["float32"], [[64]]
    with pytest.raises(TransportError, match="init_weights_update_group"):
        engine.update_weights_from_distributed(*given, "nobody")
    with pytest.raises(WeightUpdateError, match="load_format"):
        engine.update_weights_from_distributed(*given, NAME, load_format="pickle")
    with pytest.raises(ValueError, match="kv_policy: got 'sideways'"):
        policy: Any = "sideways"
        engine.update_weights_from_distributed(*given, NAME, kv_policy=policy)
    with pytest.raises(WeightUpdateError, match="backend"):
        engine.init_weights_update_group("127.0.0.1", 1, 1, 2, NAME, "mpi")
    place: dict[str, Any] = {
        "master_address": "127.0.0.1",
        "master_port": 1,
        "rank_offset": 1,
        "world_size": 2,
        "backend": "gloo",
    }
    wrong: list[tuple[str, Any]] = [
        ("master_port", "http"),
        ("master_port", None),
        ("master_port", 1 << 16),
        ("master_address", 7),
        ("rank_offset", 0),
        ("rank_offset", "1"),
        ("world_size", 1.5),
        ("group_name", ""),
        ("timeout_s", float("nan")),
    ]
    for name, value in wrong:
        with pytest.raises(WeightUpdateError, match=name):
            engine.init_weights_update_group(**{**place, name: value})
    for names, dtypes, shapes in (
        ([7], ["float32"], [[64]]),
        (["model.norm.weight"], ["float32"], [["64"]]),
        (["model.norm.weight"], ["float32"], 64),
    ):
        with pytest.raises(WeightUpdateError):
            engine.update_weights_from_distributed(names, dtypes, shapes, NAME)  # type: ignore[arg-type]
    with pytest.raises(TransportError):
        engine.destroy_weights_update_group("nobody")
