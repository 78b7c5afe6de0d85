"""Memory that comes and goes round after round ends where it began, and captured decode steps outlive it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import weight_sync
from rollout import Engine
from weight_sync import WeightPublisher

GREEDY = {"temperature": 0.0, "max_new_tokens": 8, "ignore_eos": True}
PROMPTS = [[5, 9, 2, 44], [7] * 20]


@pytest.fixture
def folder(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("qwen3", vocab_size=20_000, head_dim=32)


@pytest.fixture
def trainer(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def outputs(engine: Engine) -> list[list[int]]:
    results = engine.generate(input_ids=PROMPTS, sampling_params=GREEDY)
    return [result["output_ids"] for result in results]


def addresses(core: Any) -> list[int]:
    parameters = [parameter.data_ptr() for parameter in core.runner.model.parameters()]
    return [core.runner.kv_pool.memory.data_ptr(), *parameters]


def train(model: Any, seed: int) -> None:
    """Every second version is the first one."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5 if seed % 2 else 2.0)


def test_rounds_of_release_train_resume_sync_and_generate_end_where_they_began(
    folder: Path, trainer: Any
) -> None:
    with Engine(folder, kv_cache_bytes=16 << 20, device="cpu") as engine:
        core = engine._executor._core  # type: ignore[attr-defined]
        expected, where = outputs(engine), addresses(core)
        before = engine.weights_fingerprint(), len(os.listdir("/proc/self/fd"))
        tags: list[Any] = ["weights", "kv_cache", "cuda_graph"]
        for number in range(6):
            released = engine.release_memory_occupation(tags if number % 2 else None)
            assert set(released.tags) == set(tags[: 3 if number % 2 else 2])
            torch.zeros(released.num_bytes, dtype=torch.uint8)
            train(trainer, number)
            engine.resume_memory_occupation()
            assert engine.status().released == []
            engine.update_weights_from_tensor(trainer, weight_version=number)
            assert engine.weights_fingerprint() == weight_sync.fingerprint(trainer)
            if number % 2:
                assert outputs(engine) == expected
        assert addresses(core) == where
        assert (engine.weights_fingerprint(), len(os.listdir("/proc/self/fd"))) == before


class Graphs:
    """Captured steps, as far as memory is concerned."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.captured, self.moved = True, False

    def can_run(self, batch: object) -> bool:
        return False

    def forget(self) -> None:
        self.events.append("forget")
        self.captured = False

    def capture(self) -> None:
        self.events.append("capture")
        self.captured = True


def test_graphs_are_captured_anew_once_all_that_they_read_is_there(folder: Path) -> None:
    with Engine(folder, kv_cache_bytes=1 << 20, device="cpu") as engine:
        core = engine._executor._core  # type: ignore[attr-defined]
        graphs = core.runner.graphs = Graphs()
        expected = outputs(engine)
        engine.release_memory_occupation(keep_weights=True)
        engine.resume_memory_occupation()
        assert graphs.events == [], "their addresses are what they were"
        assert engine.release_memory_occupation(["cuda_graph"]).tags == ["cuda_graph"]
        assert engine.status().released == ["cuda_graph"] and graphs.events == ["forget"]
        engine.release_memory_occupation(["kv_cache"])
        engine.resume_memory_occupation(["cuda_graph"])
        assert graphs.events == ["forget"]
        engine.resume_memory_occupation(["kv_cache"])
        assert graphs.events == ["forget", "capture"]
        engine.resume_memory_occupation()
        assert graphs.events == ["forget", "capture"] and outputs(engine) == expected
        graphs.moved = True
        engine.release_memory_occupation(["kv_cache"])
        engine.resume_memory_occupation(["kv_cache"])
        assert graphs.events == ["forget", "capture", "forget", "capture"]


@pytest.mark.gpu
def test_a_hundred_rounds_on_a_gpu_end_byte_for_byte_where_they_began_with_their_graphs(
    folder: Path, trainer: Any
) -> None:
    trainer = trainer.to("cuda")
    with Engine(folder, kv_cache_bytes=256 << 20, device="cuda") as engine:
        core = engine._executor._core  # type: ignore[attr-defined]
        expected, where = outputs(engine), addresses(core)
        captures = core.runner.graphs.num_captures
        before = engine.weights_fingerprint()
        settled: tuple[int, int] | None = None
        for number in range(100):
            released = engine.release_memory_occupation()
            taken = torch.empty(released.num_bytes * 9 // 10, dtype=torch.uint8, device="cuda")
            taken.fill_(0xFF)
            train(trainer, number)
            del taken
            torch.cuda.empty_cache()
            engine.resume_memory_occupation()
            engine.update_weights_from_tensor(trainer)
            if number % 2:
                assert outputs(engine) == expected
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            held = torch.cuda.mem_get_info()[0], torch.cuda.memory_allocated()
            settled = held if number == 4 else settled
            assert settled is None or held == settled, f"round {number}"
        assert engine.weights_fingerprint() == before == weight_sync.fingerprint(trainer)
        assert addresses(core) == where and core.runner.graphs.num_captures == captures
        freed = engine.release_memory_occupation(["cuda_graph"]).num_bytes
        assert freed > 0 and not core.runner.graphs.captured
        engine.resume_memory_occupation()
        assert core.runner.graphs.num_captures == captures + 1 and outputs(engine) == expected


@pytest.mark.gpu
@pytest.mark.parametrize("staging", ["extra", "kv_cache", "none"])
def test_a_colocated_loop_in_two_processes_takes_no_more_memory_round_after_round(
    folder: Path, trainer: Any, staging: Any
) -> None:
    trainer = trainer.to("cuda")
    with (
        Engine(folder, executor="local", kv_cache_bytes=256 << 20, device="cuda") as engine,
        WeightPublisher(
            engine, transport="cuda_ipc", arena_bytes=10 << 20, staging=staging
        ) as publisher,
    ):
        expected = outputs(engine)
        free: list[int] = []
        for number in range(20):
            released = engine.release_memory_occupation()
            taken = torch.empty(released.num_bytes // 2, dtype=torch.uint8, device="cuda")
            train(trainer, number)
            del taken
            torch.cuda.empty_cache()
            engine.resume_memory_occupation(["weights"])
            report = publisher.publish(trainer)
            assert report.fingerprint == weight_sync.fingerprint(trainer)
            packed = publisher._endpoint._packed
            assert packed is not None and packed.window is not None, "bytes would wait in the arena"
            engine.resume_memory_occupation(["kv_cache"])
            if number % 2:
                assert outputs(engine) == expected
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            free.append(torch.cuda.mem_get_info()[0])
        # An allocator may take a piece more of 2 MiB in some round, but not round after round.
        assert len(set(free[10:])) == 1 and free[4] - free[-1] <= 2 << 20, f"{free}"
