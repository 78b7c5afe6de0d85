"""Where the bytes of an update wait: in extra memory, in what the KV cache gave back, or nowhere."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ipc_stand_in import stand_in
from sync_support import ToyEngine, ToyHost, eventually, kill, read_line, toy_map, weights
from torch.multiprocessing.reductions import StorageWeakRef

import weight_sync
from rollout import Engine
from rollout.errors import RolloutError
from weight_sync import WeightPublisher
from weight_sync.errors import (
    DeadlineExceeded,
    FingerprintMismatch,
    SyncError,
    TornWeightsError,
    WeightUpdateError,
)
from weight_sync.publisher.update import Update
from weight_sync.receiver.session import Session
from weight_sync.staging import opened_cuda_ipc, shadow
from weight_sync.staging.shadow import Shadow
from weight_sync.staging.shadow_stage import StageMemory

NAMED = list(weights(0.0))
WAYS: dict[str, dict[str, Any]] = {
    "over a group": {"transport": "process_group", "group_backend": "gloo"},
    "in two buckets": {"transport": "cuda_ipc", "arena_bytes": 2048},
}


@pytest.fixture(params=list(WAYS))
def make_publisher(
    request: pytest.FixtureRequest,
    make_engine: Callable[..., ToyEngine],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Callable[..., tuple[ToyEngine, WeightPublisher]]]:
    stand_in(monkeypatch)
    monkeypatch.setattr(
        opened_cuda_ipc, "_check_owner", lambda handle: None
    )  # the trainer is here too
    made = []

    def make(staging: str) -> tuple[ToyEngine, WeightPublisher]:
        engine = make_engine(serve=True)
        options: dict[str, Any] = {"staging": staging, "timeout_s": 10, **WAYS[request.param]}
        made.append(WeightPublisher(engine.address, **options))
        return engine, made[-1]

    yield make
    for publisher in made:
        publisher.close()


def part(value: float, first: int, last: int) -> dict[str, torch.Tensor]:
    tensors = weights(value)
    return {name: tensors[name] for name in NAMED[first:last]}


def test_without_a_stage_the_weights_are_nobodys_until_the_update_is_complete(
    make_publisher: Callable[..., tuple[ToyEngine, WeightPublisher]],
) -> None:
    engine, publisher = make_publisher("none")
    for value in (1.0, 2.0):
        report = publisher.publish(weights(value))
        assert engine.values() == {value} and engine.receiver.torn is None
        assert report.fingerprint == weight_sync.fingerprint(weights(value))
    assert engine.host.events.count("torn") == 2
    publisher.begin()
    assert engine.receiver.torn is None, "nothing has come yet"
    publisher.send(part(3.0, 0, 4))
    assert "without a stage was not completed" in str(engine.receiver.torn)
    assert engine.values() == {2.0, 3.0}, "it is written at once"
    publisher.send(part(3.0, 4, len(NAMED)))
    publisher.commit()
    assert engine.values() == {3.0} and engine.receiver.torn is None and engine.host.torn is None
    extra, none = engine.receiver.stages.of("extra"), engine.receiver.stages.of("none")
    assert extra.num_bytes == 0 and none.num_bytes < 2 * sum(
        t.nbytes for t in weights(0.0).values()
    )
    assert none._shadow is not None and none._shadow.num_bytes == 0


def test_an_update_without_a_stage_that_ends_half_way_leaves_torn_weights_which_the_next_repairs(
    make_publisher: Callable[..., tuple[ToyEngine, WeightPublisher]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine, publisher = make_publisher("none")
    publisher.publish(weights(1.0))
    publisher.begin()
    publisher.send(part(2.0, 0, 4))
    publisher.abort()
    assert engine.receiver.torn is not None and engine.host.torn is not None
    assert engine.receiver.version == 1
    publisher.publish(weights(3.0))
    assert engine.values() == {3.0} and engine.receiver.torn is None
    submit = Update._submit_bucket

    def damaged(update: Update, packed: Any, deadline: Any) -> None:
        packed.fingerprints[:] ^= 1
        submit(update, packed, deadline)

    publisher.begin()
    publisher.send(part(4.0, 0, 2))
    monkeypatch.setattr(Update, "_submit_bucket", damaged)
    with pytest.raises(FingerprintMismatch, match="staged bytes"):
        publisher.send(part(4.0, 2, len(NAMED)))
    publisher.abort()
    assert engine.receiver.torn is not None
    monkeypatch.undo()


@pytest.mark.parametrize("lease_s", [None, 600.0])
def test_an_update_without_a_stage_that_begins_to_write_too_late_for_its_caller_tears_nothing(
    make_publisher: Callable[..., tuple[ToyEngine, WeightPublisher]], lease_s: float | None
) -> None:
    """However long the lease is, and whatever came of the abort: nobody is told "too late", and torn afterwards."""
    engine, publisher = make_publisher("none")
    publisher.publish(weights(1.0))
    publisher._timeout_s = 0.5
    publisher.begin(lease_s=lease_s)
    engine.host.blocked.set()
    with pytest.raises(DeadlineExceeded):
        publisher.send(weights(2.0))
    publisher._timeout_s = 20.0
    publisher.abort()
    engine.host.blocked.clear()
    assert eventually(lambda: engine.receiver._session is None)
    engine.host.between_steps(lambda: None, 20.0)
    assert engine.receiver.torn is None and engine.host.torn is None
    assert engine.values() == {1.0}
    publisher.publish(weights(3.0))
    assert engine.values() == {3.0}


def test_what_is_refused_before_the_first_byte_tears_nothing(
    make_publisher: Callable[..., tuple[ToyEngine, WeightPublisher]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine, publisher = make_publisher("none")
    publisher.publish(weights(1.0))
    with pytest.raises(WeightUpdateError, match="must be complete"):
        publisher.publish(part(2.0, 0, 3), strict=False)
    with pytest.raises(SyncError):
        publisher.publish(part(2.0, 0, 3))
    submit = Update._submit_bucket

    def damaged(update: Update, packed: Any, deadline: Any) -> None:
        packed.fingerprints[:] ^= 1
        submit(update, packed, deadline)

    with monkeypatch.context() as patch:
        patch.setattr(Update, "_submit_bucket", damaged)
        with pytest.raises(FingerprintMismatch, match="staged bytes"):
            publisher.publish(weights(2.0))
    assert engine.receiver.torn is None and engine.values() == {1.0}
    publisher.publish(weights(3.0))
    assert engine.values() == {3.0}


def test_an_update_waits_in_what_the_kv_cache_gave_back_and_holds_it_no_longer_than_it_lasts(
    make_publisher: Callable[..., tuple[ToyEngine, WeightPublisher]],
) -> None:
    engine, publisher = make_publisher("kv_cache")
    with pytest.raises(WeightUpdateError, match="KV cache has its memory"):
        publisher.publish(weights(1.0))
    assert engine.values() == {0.0} and not engine.receiver.updating
    engine.host.kv_released = True
    memory = engine.receiver.stages.of("kv_cache")
    for value in (1.0, 2.0):
        publisher.publish(weights(value))
        assert engine.values() == {value} and memory.num_bytes == 0 and not engine.host.kv_lent
    publisher.begin()
    publisher.send(part(3.0, 0, 4))
    assert engine.host.kv_lent and memory.num_bytes > 0 and engine.values() == {2.0}
    publisher.abort()
    assert not engine.host.kv_lent and memory.num_bytes == 0 and engine.values() == {2.0}
    assert engine.receiver.torn is None
    engine.host.kv_released = False
    with pytest.raises(WeightUpdateError, match="KV cache has its memory"):
        publisher.publish(weights(4.0))
    assert engine.host.events.count("lend") == engine.host.events.count("return") == 3


@pytest.fixture
def kept_when_returned(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """For each time that the KV cache's memory is returned, how many pieces of it somebody still holds."""
    taken: list[StorageWeakRef] = []
    kept: list[int] = []
    allocate, give_back = Shadow.__init__, ToyHost.return_kv_cache
    incoming = StageMemory.incoming

    def noted(tensor: torch.Tensor) -> torch.Tensor:
        taken.append(StorageWeakRef(tensor.untyped_storage()))
        return tensor

    def made(self: Shadow, weight_map: Any) -> None:
        allocate(self, weight_map)
        list(map(noted, self._buffers.values()))

    def returned(self: ToyHost) -> None:
        # gloo's own thread lets go of what it has filled a moment after it says so.
        eventually(lambda: all(piece.expired() for piece in taken), 2.0)
        kept.append(sum(not piece.expired() for piece in taken))
        give_back(self)

    monkeypatch.setattr(Shadow, "__init__", made)
    monkeypatch.setattr(StageMemory, "incoming", lambda *a: noted(incoming(*a)))
    monkeypatch.setattr(ToyHost, "return_kv_cache", returned)
    return kept


@pytest.mark.parametrize(
    "fails", ["nowhere", "a bucket", "the write", "the check of what is resident"]
)
def test_what_the_kv_cache_lent_is_free_when_it_is_returned_however_the_update_ends(
    make_publisher: Callable[..., tuple[ToyEngine, WeightPublisher]],
    monkeypatch: pytest.MonkeyPatch,
    kept_when_returned: list[int],
    fails: str,
) -> None:
    """An error's traceback holds the frames it went through, and they the memory they worked on; a KV cache that is
    resumed then would find no room."""
    engine, publisher = make_publisher("kv_cache")
    engine.host.kv_released = True
    engine.host.looks = False
    if fails == "a bucket":
        submit = Update._submit_bucket

        def damaged(update: Update, packed: Any, deadline: Any) -> None:
            packed.fingerprints[:] ^= 1
            submit(update, packed, deadline)

        monkeypatch.setattr(Update, "_submit_bucket", damaged)
    elif fails == "the write":
        copy = shadow.copy_ranges

        def broken(targets: Any, sources: Any) -> None:
            copy(targets, sources)
            raise RuntimeError("the write broke on purpose")

        monkeypatch.setattr(shadow, "copy_ranges", broken)
    elif fails == "the check of what is resident":
        monkeypatch.setattr(Session, "compare", compare_that_refuses(Session.compare))
    if fails == "nowhere":
        publisher.publish(weights(1.0))
    else:
        with pytest.raises(SyncError):
            publisher.publish(weights(1.0))
    assert kept_when_returned == [0]


def compare_that_refuses(compare: Callable[..., None]) -> Callable[..., None]:
    def refuse(self: Session, found: Any, indices: Any, declared: Any, where: str) -> None:
        compare(self, found ^ 1 if where == "resident" else found, indices, declared, where)

    return refuse


@pytest.mark.parametrize("phase", ["begin", "stage", "vote", "commit", "committed"])
def test_a_trainer_that_is_killed_without_a_stage_leaves_an_engine_that_serves_nothing_half(
    child: Callable[..., Any], phase: str
) -> None:
    process = child("engine_process.py")
    address = read_line(process)

    def state() -> dict[str, Any]:
        process.stdin.write("state\n")
        process.stdin.flush()
        found: dict[str, Any] = json.loads(read_line(process))
        return found

    doomed = child("trainer_process.py", address, phase, "process_group", "cpu", "none")
    assert read_line(doomed) == "ready"
    kill(doomed)
    found = state()
    torn = found["torn"] is not None
    if phase != "commit":  # which arrives, or is lost with its trainer
        assert torn is (phase in ("stage", "vote"))
    if not torn:
        assert found["values"] == [2.0 if phase.startswith("commit") else 0.0]
    with WeightPublisher(address, timeout_s=20) as publisher:
        assert eventually(lambda: publishes(publisher))
    found = state()
    assert found["values"] == [5.0] and found["torn"] is None and found["mixtures"] == []


def publishes(publisher: WeightPublisher) -> bool:
    """False while the dead trainer's session has not been noticed."""
    try:
        return publisher.publish(weights(5.0)).complete
    except SyncError:
        return False


GREEDY = {"temperature": 0.0, "max_new_tokens": 8, "ignore_eos": True}
PROMPT = [5, 9, 2, 44]


@pytest.fixture
def folder(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("qwen3", head_dim=32)


@pytest.fixture
def trainer(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("tp_size", [1, 2])
def test_a_colocated_loop_updates_in_the_memory_of_its_released_kv_cache(
    folder: Path, trainer: Any, tp_size: int
) -> None:
    with (
        Engine(
            folder,
            executor="local",
            tp_size=tp_size,
            device="cpu",
            num_threads=1,
            kv_cache_bytes=4 << 20,
        ) as engine,
        WeightPublisher(engine, transport="process_group", staging="kv_cache") as publisher,
    ):
        expected = engine.generate(input_ids=PROMPT, sampling_params=GREEDY)["output_ids"]
        with pytest.raises(WeightUpdateError, match="release_memory_occupation"):
            publisher.publish(trainer)
        for _ in range(2):
            engine.release_memory_occupation()
            engine.resume_memory_occupation(["weights"])
            publisher.begin()
            publisher.send(trainer)
            with pytest.raises(RolloutError, match="an update waits in its memory"):
                engine.resume_memory_occupation(["kv_cache"])
            publisher.commit()
            engine.resume_memory_occupation(["kv_cache"])
            result = engine.generate(input_ids=PROMPT, sampling_params=GREEDY)
            assert result["output_ids"] == expected


@pytest.mark.parametrize("tp_size", [1, 2])
def test_without_a_stage_running_requests_end_and_the_next_ones_see_the_new_version(
    folder: Path, trainer: Any, tp_size: int
) -> None:
    params = {"temperature": 0.0, "max_new_tokens": 400, "ignore_eos": True}
    with (
        Engine(
            folder,
            executor="local",
            tp_size=tp_size,
            device="cpu",
            num_threads=1,
            kv_cache_bytes=4 << 20,
        ) as engine,
        WeightPublisher(engine, transport="process_group", staging="none") as publisher,
    ):
        with torch.no_grad():
            trainer.model.norm.weight.mul_(1.5)
        results: list[Any] = []
        started = threading.Event()

        def run() -> None:
            for chunk in engine.generate(input_ids=PROMPT, sampling_params=params, stream=True):
                started.set()
            results.append(chunk)

        thread = threading.Thread(target=run)
        thread.start()
        assert started.wait(60)
        publisher.publish(trainer)
        thread.join(60)
        reason = results[0]["meta_info"]["finish_reason"]
        assert reason["type"] == "abort" and "without a stage" in reason["message"]
        assert engine.status().torn is None
        assert engine.weights_fingerprint() == weight_sync.fingerprint(trainer)
        output = engine.generate(input_ids=PROMPT, sampling_params=GREEDY)["output_ids"]
        with torch.no_grad():
            rows = trainer(torch.tensor([PROMPT + output])).logits[0, len(PROMPT) - 1 : -1]
        assert rows.argmax(-1).tolist() == output
        publisher.begin()
        publisher.send([("model.norm.weight", trainer.model.norm.weight)])
        with pytest.raises(TornWeightsError, match="without a stage was not completed"):
            engine.generate(input_ids=PROMPT, sampling_params=GREEDY)
        publisher.abort()
        publisher.publish(trainer)
        assert engine.generate(input_ids=PROMPT, sampling_params=GREEDY)["output_ids"] == output
        engine.release_memory_occupation(keep_weights=True)
        with pytest.raises(WeightUpdateError, match="resume_memory_occupation"):
            publisher.publish(trainer)  # there is nowhere to write it
        engine.resume_memory_occupation()
        assert engine.status().torn is None
        assert engine.generate(input_ids=PROMPT, sampling_params=GREEDY)["output_ids"] == output


def test_new_memory_is_not_uploaded_into_before_steps_have_let_go_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What torch hands out again may still be read by kernels of its own stream; uploads come on another."""
    made: list[str] = []
    empty = torch.empty

    def allocated(*sizes: Any, device: Any, **options: Any) -> torch.Tensor:
        made.append(f"memory of {device}")
        return empty(*sizes, **options)

    stream = SimpleNamespace(synchronize=lambda: made.append("waited"))
    memory = StageMemory(toy_map(), torch.device("cuda"))
    monkeypatch.setattr(torch, "empty", allocated)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    assert memory.incoming(0, 512).numel() == 512
    assert made == ["memory of cuda", "waited"]
    assert memory.incoming(0, 256).numel() == 256 and len(made) == 2
