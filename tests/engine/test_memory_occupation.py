"""Giving memory back to a colocated trainer, and taking it again."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import weight_sync
from rollout import Engine
from rollout.errors import InvalidRequestError, RolloutError
from rollout.protocol import commands as cmd
from rollout.runner.memory_regions import CpuRegion, HostCopy, MappedRegion
from weight_sync.devices.driver import DeviceOutOfMemory
from weight_sync.errors import TornWeightsError, TransportError, WeightUpdateError

GREEDY = {"temperature": 0.0, "max_new_tokens": 8, "ignore_eos": True}
PROMPT = [5, 9, 2, 44]


@pytest.fixture
def folder(tiny_checkpoint: Callable[..., Path]) -> Path:
    # Large enough for its pages to show in the size of the process: 12 MB of weights.
    return tiny_checkpoint("qwen3", vocab_size=20_000, head_dim=32)


@pytest.fixture
def trainer(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def resident_bytes() -> int:
    """Memory of this process that has pages."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def test_released_memory_goes_back_to_the_system_and_addresses_stay(
    folder: Path, trainer: Any
) -> None:
    with Engine(folder, kv_cache_bytes=64 << 20, device="cpu") as engine:
        core = engine._executor._core  # type: ignore[attr-defined]
        core.runner.kv_pool.memory.fill_(1.0)
        expected = engine.generate(input_ids=PROMPT, sampling_params=GREEDY)["output_ids"]
        addresses = [p.data_ptr() for p in core.runner.model.parameters()]
        before = resident_bytes()
        released = engine.release_memory_occupation()
        assert set(released.tags) == {"weights", "kv_cache"} and released.num_bytes > 60 << 20
        assert before - resident_bytes() > 0.9 * released.num_bytes
        assert engine.release_memory_occupation().tags == []
        engine.resume_memory_occupation()
        assert engine.resume_memory_occupation().num_bytes == 0
        with pytest.raises(TornWeightsError, match="released"):
            engine.generate(input_ids=PROMPT, sampling_params=GREEDY)
        engine.update_weights_from_tensor(trainer)
        assert engine.generate(input_ids=PROMPT, sampling_params=GREEDY)["output_ids"] == expected
        assert [p.data_ptr() for p in core.runner.model.parameters()] == addresses


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_weights_that_are_kept_serve_again_once_they_are_resumed(folder: Path, device: str) -> None:
    with Engine(folder, kv_cache_bytes=4 << 20, device=device) as engine:
        expected = engine.generate(input_ids=PROMPT, sampling_params=GREEDY)["output_ids"]
        fingerprint = engine.weights_fingerprint()
        core = engine._executor._core  # type: ignore[attr-defined]
        for _ in range(2):
            released = engine.release_memory_occupation(keep_weights=True)
            assert set(released.tags) == {"weights", "kv_cache"}
            with pytest.raises(WeightUpdateError, match="resume_memory_occupation"):
                engine.weights_fingerprint()
            engine.resume_memory_occupation(["weights"])
            core.memory.undo_resume(["weights"])  # As when another rank has no room.
            engine.resume_memory_occupation()
            assert engine.status().torn is None
            assert engine.weights_fingerprint() == fingerprint
            again = engine.generate(input_ids=PROMPT, sampling_params=GREEDY)
            assert again["output_ids"] == expected
        engine.release_memory_occupation()
        engine.resume_memory_occupation()
        assert engine.status().torn is not None


@pytest.mark.gpu
def test_released_gpu_memory_goes_back_to_the_device_and_addresses_stay(
    folder: Path, trainer: Any
) -> None:
    with Engine(folder, kv_cache_bytes=256 << 20, device="cuda") as engine:
        core = engine._executor._core  # type: ignore[attr-defined]
        expected = engine.generate(input_ids=PROMPT, sampling_params=GREEDY)["output_ids"]
        parameters = dict(core.runner.model.named_parameters())
        addresses = [core.runner.kv_pool.memory.data_ptr()]
        addresses += [p.data_ptr() for p in core.runner.model.parameters()]
        before = torch.cuda.mem_get_info()[0]
        released = engine.release_memory_occupation()
        assert set(released.tags) == {"weights", "kv_cache"} and released.num_bytes > 256 << 20
        assert torch.cuda.mem_get_info()[0] - before > 0.9 * released.num_bytes
        with pytest.raises(WeightUpdateError, match="resume_memory_occupation"):
            engine.update_weights_from_tensor(trainer)
        engine.resume_memory_occupation()
        with pytest.raises(TornWeightsError, match="released"):
            engine.generate(input_ids=PROMPT, sampling_params=GREEDY)
        parts = list(trainer.named_parameters())
        for part in (parts[:5], parts[5:]):
            engine.update_weights_from_tensor(part, flush_cache=False, weight_version="1")
        assert engine.weights_fingerprint() == weight_sync.fingerprint(trainer)
        assert engine.generate(input_ids=PROMPT, sampling_params=GREEDY)["output_ids"] == expected
        for name, parameter in core.runner.model.named_parameters():
            assert parameter is parameters[name]
        after = [core.runner.kv_pool.memory.data_ptr()]
        after += [p.data_ptr() for p in core.runner.model.parameters()]
        assert after == addresses


@pytest.mark.parametrize("tp_size", [1, 2])
def test_the_colocated_sequence_of_trainers_works(folder: Path, trainer: Any, tp_size: int) -> None:
    """Release, train, resume weights, update bucket by bucket without a session, resume the KV cache, continue."""
    with Engine(
        folder, executor="local", tp_size=tp_size, num_threads=1, kv_cache_bytes=4 << 20
    ) as engine:
        expected = engine.generate(input_ids=PROMPT, sampling_params=GREEDY)["output_ids"]
        engine.release_memory_occupation()
        with pytest.raises(WeightUpdateError, match="resume_memory_occupation"):
            engine.update_weights_from_tensor(trainer)
        engine.resume_memory_occupation(["weights"])
        tensors = list(trainer.named_parameters())
        parts = [tensors[first : first + 7] for first in range(0, len(tensors), 7)]
        for part in parts[:-1]:
            engine.update_weights_from_tensor(part, flush_cache=False, weight_version="17")
            assert engine.status().torn is not None
        engine.update_weights_from_tensor(parts[0], weight_version="18")
        engine.update_weights_from_tensor(parts[-1], weight_version="17")
        assert engine.status().torn is not None, "parts of two versions do not make one"
        for part in parts:
            engine.update_weights_from_tensor(part, flush_cache=False, weight_version="19")
        assert engine.status().torn is None
        engine.resume_memory_occupation(["kv_cache"])
        result = engine.generate(input_ids=PROMPT, sampling_params=GREEDY)
        assert result["output_ids"] == expected and result["meta_info"]["weight_version"] == "19"


def test_requests_wait_for_the_kv_cache_and_none_is_lost(folder: Path) -> None:
    params = {"temperature": 0.0, "max_new_tokens": 200, "ignore_eos": True}
    with Engine(folder, kv_cache_bytes=4 << 20) as engine:
        expected = engine.generate(input_ids=PROMPT, sampling_params=params)["output_ids"]
        results: list[Any] = []
        started = threading.Event()

        def run() -> None:
            for chunk in engine.generate(input_ids=PROMPT, sampling_params=params, stream=True):
                started.set()
            results.append(chunk)

        engine.slow_down(0.02)  # Or it may be over before this thread gets to it.
        thread = threading.Thread(target=run)
        thread.start()
        assert started.wait(30)
        engine.release_memory_occupation(["kv_cache"])
        engine.slow_down(None)
        assert engine.status().released == ["kv_cache"]
        time.sleep(0.1)
        assert thread.is_alive()
        engine.resume_memory_occupation(["kv_cache"])
        thread.join(60)
        assert results[0]["output_ids"] == expected
        assert results[0]["meta_info"]["num_retractions"] == 1


def test_an_unknown_tag_is_refused(folder: Path) -> None:
    with (
        Engine(folder, kv_cache_bytes=1 << 20) as engine,
        pytest.raises(InvalidRequestError, match="kv_cache"),
    ):
        engine.release_memory_occupation(["cuda_graphs"])  # type: ignore[list-item]


def test_what_is_released_cannot_be_read(folder: Path) -> None:
    with Engine(folder, kv_cache_bytes=1 << 20, device="cpu") as engine:
        engine.release_memory_occupation(["weights"])
        with pytest.raises(WeightUpdateError, match="resume_memory_occupation"):
            engine.weights_fingerprint()
        with pytest.raises(RolloutError, match="resume_memory_occupation"):
            engine.get_weights_by_name("model.norm.weight")


def test_memory_that_cannot_be_had_again_is_an_error_and_stays_released(
    folder: Path, trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: CpuRegion) -> None:
        raise RolloutError("another process has it")

    with Engine(folder, kv_cache_bytes=1 << 20, device="cpu") as engine:
        engine.release_memory_occupation()
        with monkeypatch.context() as patch:
            patch.setattr(CpuRegion, "resume", fail)
            with pytest.raises(RolloutError, match="another process"):
                engine.resume_memory_occupation()
        assert set(engine.status().released) == {"weights", "kv_cache"}
        assert set(engine.resume_memory_occupation().tags) == {"weights", "kv_cache"}
        engine.update_weights_from_tensor(trainer)
        assert engine.generate(input_ids=PROMPT, sampling_params=GREEDY)["output_ids"]


def test_a_release_that_fails_half_way_leaves_nothing_that_looks_like_weights(
    folder: Path, trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pages of the weights have gone by then, and those of the KV cache have not."""
    release, calls = CpuRegion.release, itertools.count()

    def fail_second(self: CpuRegion) -> None:
        if next(calls):
            raise RolloutError("the pages are locked")
        release(self)

    with Engine(folder, kv_cache_bytes=1 << 20, device="cpu") as engine:
        expected = engine.generate(input_ids=PROMPT, sampling_params=GREEDY)["output_ids"]
        with monkeypatch.context() as patch:
            patch.setattr(CpuRegion, "release", fail_second)
            with pytest.raises(RolloutError, match="locked"):
                engine.release_memory_occupation()
        assert set(engine.status().released) == {"weights", "kv_cache"}
        engine.resume_memory_occupation()
        with pytest.raises(TornWeightsError, match="released"):
            engine.generate(input_ids=PROMPT, sampling_params=GREEDY)
        engine.update_weights_from_tensor(trainer)
        assert engine.generate(input_ids=PROMPT, sampling_params=GREEDY)["output_ids"] == expected


@pytest.mark.parametrize("call", ["keep", "release", "resume", "restore"])
def test_what_fails_on_another_rank_fails_on_this_one_and_both_hold_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    with Engine(folder, kv_cache_bytes=1 << 20, device="cpu") as engine:
        core = engine._executor._core  # type: ignore[attr-defined]
        expected = engine.generate(input_ids=PROMPT, sampling_params=GREEDY)["output_ids"]
        commands = core._handlers[cmd.ReleaseMemory].__self__
        on_all, whats = commands._on_all, []
        no_gpu: list[None] = []  # what a copy to one that has failed raises

        def fail_there(what: str, step: Callable[[], Any]) -> Any:
            whats.append(what)
            if what.startswith(call):
                with monkeypatch.context() as patch:
                    patch.setattr(commands, "_any_rank", lambda flag: True)
                    return on_all(what, step)
            return on_all(what, step)

        monkeypatch.setattr(commands, "_on_all", fail_there)
        if call == "restore":
            monkeypatch.setattr(HostCopy, "restore", lambda self: no_gpu.pop())
        if call in ("keep", "release"):
            with pytest.raises(RolloutError, match="another rank"):
                engine.release_memory_occupation(keep_weights=True)
        else:
            engine.release_memory_occupation(keep_weights=True)
            with pytest.raises(RolloutError):
                engine.resume_memory_occupation()
        held = set(engine.status().released)
        assert held == (set() if call == "keep" else {"weights", "kv_cache"})
        monkeypatch.undo()
        engine.resume_memory_occupation()
        assert engine.generate(input_ids=PROMPT, sampling_params=GREEDY)["output_ids"] == expected
        assert whats[0] == "keep weights"


def test_weights_that_the_host_has_no_room_for_stay_where_they_are(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Engine(folder, kv_cache_bytes=1 << 20, device="cpu") as engine:
        expected = engine.generate(input_ids=PROMPT, sampling_params=GREEDY)["output_ids"]

        def no_room(self: HostCopy, tensors: Any) -> None:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

        monkeypatch.setattr(HostCopy, "__init__", no_room)
        with pytest.raises(RolloutError, match="cannot keep weights"):
            engine.release_memory_occupation(keep_weights=True)
        assert engine.status().released == [] and engine.status().torn is None
        assert engine.generate(input_ids=PROMPT, sampling_params=GREEDY)["output_ids"] == expected


def test_weights_stay_while_an_update_is_under_way(folder: Path, trainer: Any) -> None:
    with Engine(folder, kv_cache_bytes=1 << 20, device="cpu") as engine:
        engine.begin_weight_update()
        engine.update_weights_from_tensor(trainer)
        with pytest.raises(RolloutError, match="an update is under way"):
            engine.release_memory_occupation()
        assert engine.status().released == []
        engine.end_weight_update()
        assert engine.release_memory_occupation().tags


class Gpu:
    """Bytes that are free on a device, and what torch keeps cached of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, free: int, cached: int) -> None:
        self.free, self._cached = free, cached
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
        monkeypatch.setattr(torch.cuda, "empty_cache", self._empty)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (self.free, 100))

    def _empty(self) -> None:
        self.free, self._cached = self.free + self._cached, 0


class OfGpu:
    """A `MappedMemory` without an address."""

    def __init__(self, gpu: Gpu, num_bytes: int, error: Exception | None = None) -> None:
        self._gpu, self.num_bytes, self._error, self.mapped = gpu, num_bytes, error, False

    def release(self) -> None:
        if self.mapped:
            self._gpu.free, self.mapped = self._gpu.free + self.num_bytes, False

    def resume(self) -> None:
        if self._error is not None:
            raise self._error
        if not self.mapped:
            if self._gpu.free < self.num_bytes:
                raise DeviceOutOfMemory("none left")
            self._gpu.free, self.mapped = self._gpu.free - self.num_bytes, True


def test_what_torch_keeps_cached_is_no_reason_to_have_no_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of an update that waited in the KV cache's memory, say."""
    gpu = Gpu(monkeypatch, free=40, cached=30)
    memories = [OfGpu(gpu, 30), OfGpu(gpu, 30)]
    region = MappedRegion(memories, torch.device("cuda", 0))  # type: ignore[arg-type]
    region.resume()
    assert all(memory.mapped for memory in memories) and gpu.free == 10


@pytest.mark.parametrize("error", [None, TransportError("cuMemCreate failed")])
def test_memory_that_cannot_all_be_resumed_is_not_resumed_in_part(
    monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    gpu = Gpu(monkeypatch, free=40, cached=10)
    memories = [OfGpu(gpu, 30), OfGpu(gpu, 30, error)]
    region = MappedRegion(memories, torch.device("cuda", 0))  # type: ignore[arg-type]
    with pytest.raises(RolloutError if error is None else TransportError):
        region.resume()
    assert not any(memory.mapped for memory in memories)
