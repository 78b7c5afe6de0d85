"""The KV pool of a GPU is what is left once the largest step has been seen; readings of its memory are made up here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rollout import Engine
from rollout.config import EngineConfig
from rollout.engine.loop import build
from rollout.engine.loop.kv_size import blocks_that_fit, measured
from rollout.errors import ConfigError
from rollout.runner.model_runner import ModelRunner

GB = 1 << 30
MB = 1 << 20
GREEDY = {"temperature": 0.0, "max_new_tokens": 12, "ignore_eos": True}


@pytest.fixture(scope="module")
def folder(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("qwen3", head_dim=32)


class Memory:
    """A device with `free` bytes, of which loading takes `loaded`, and a step `step` for a while."""

    def __init__(self, free: int, loaded: int, step: int) -> None:
        self._readings = [free, free - loaded]
        self._step = step
        self.num_peaks = 0

    def free_bytes(self) -> int:
        return self._readings.pop(0)

    def forget_peak(self) -> None:
        self.num_peaks += 1

    def taken_bytes(self) -> int:
        return self._step


def fit(config: EngineConfig, **readings: int) -> int:
    given = {"before": 80 * GB, "free": 60 * GB, "transient": 4 * GB, "block_bytes": 8 * MB}
    return blocks_that_fit(config, device="cuda:0", **{**given, "longest": 1024, **readings})


def test_a_pool_is_what_weights_a_step_and_a_margin_leave() -> None:
    config = EngineConfig(model_path="x")
    assert fit(config) == (60 * GB - 4 * GB - int(0.03 * 80 * GB)) // (8 * MB)
    assert fit(config, before=9 * GB, free=6 * GB) == (2 * GB - 512 * MB) // (8 * MB)
    # No more than all requests at their longest can use.
    assert fit(config, longest=2) == 256 * 2


def test_a_fraction_is_of_what_was_free_and_covers_the_weights() -> None:
    half = EngineConfig(model_path="x", mem_fraction_static=0.5)
    assert fit(half) == (40 * GB - 20 * GB) // (8 * MB)
    whole = EngineConfig(model_path="x", mem_fraction_static=0.99)
    assert fit(whole) == fit(EngineConfig(model_path="x")), "a step must still fit"


def test_what_does_not_fit_says_what_was_taken_and_what_to_lower() -> None:
    asked = EngineConfig(model_path="x", kv_cache_bytes=57 * GB)
    message = (
        r"kv_cache_bytes: got 61,203,283,968, expected at most 60,129,542,144 on cuda:0 \(21,474,836,480 of "
        r"85,899,345,920 free bytes are taken, and a step takes 4,294,967,296\); lower it, chunked_prefill_size or "
    )
    with pytest.raises(ConfigError, match=message):
        fit(asked)
    assert fit(EngineConfig(model_path="x", kv_cache_bytes=56 * GB)) == 56 * 128
    with pytest.raises(
        ConfigError, match=r"got room for 0 bytes .*; raise mem_fraction_static, lower chunked"
    ):
        fit(EngineConfig(model_path="x"), free=4 * GB)
    with pytest.raises(ConfigError, match="got room for 0 bytes"):
        fit(EngineConfig(model_path="x", mem_fraction_static=0.1))


def test_an_engine_runs_the_largest_step_and_then_takes_the_pool_that_fits(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Engine(folder, device="cpu", kv_cache_bytes=4 * MB) as engine:
        expected = engine.generate(input_ids=[[5, 9, 2]] * 3, sampling_params=GREEDY)
    memory = Memory(free=4 * GB, loaded=GB, step=2 * GB)
    steps: list[tuple[int, int]] = []
    run = ModelRunner.run_largest_step

    def noted(self: ModelRunner, num_tokens: int, num_rows: int, context_length: int) -> None:
        steps.append((num_tokens, self.kv_pool.memory.shape[1]))
        run(self, num_tokens, num_rows, context_length)

    monkeypatch.setattr(ModelRunner, "run_largest_step", noted)
    monkeypatch.setattr(build, "device_memory", lambda device: memory)
    options: dict[str, Any] = {"chunked_prefill_size": 700, "max_running_requests": 4}
    with Engine(folder, device="cpu", **options) as engine:
        status = engine.status()
        # 700 tokens are one prompt of 512, the longest, and one of 188; 16 tokens fill a block.
        assert steps == [(700, 64)] and memory.num_peaks == 1
        assert status.num_blocks == status.num_free_blocks == 4 * 512 // 16
        assert status.resolved["kv_cache_bytes"] == status.num_blocks * 16 * 2 * 2 * 2 * 32 * 4
        results = engine.generate(input_ids=[[5, 9, 2]] * 3, sampling_params=GREEDY)
    assert [r["output_ids"] for r in results] == [r["output_ids"] for r in expected]


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("load_model", r"cpu has too little memory for [\d,]+ bytes of weights.*raise tp_size"),
        ("run_largest_step", "too little memory for a step of 2048 tokens.*lower chunked_prefill"),
        ("resize_memory_pool", r"too little memory for a KV pool of [\d,]+ bytes.*mem_fraction_s"),
        (
            "init_device_graphs",
            "for graphs of steps of up to 256 requests.*disable_cuda_graph=True",
        ),
    ],
)
def test_running_out_of_memory_names_what_it_was_for_and_what_to_lower(
    method: str, message: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nOf the allocated memory ...")

    monkeypatch.setattr(ModelRunner, method, none_left)
    monkeypatch.setattr(build, "device_memory", lambda device: Memory(4 * GB, GB, GB))
    with pytest.raises(ConfigError, match=message) as caught:
        Engine(folder, device="cpu")
    assert "\n" not in str(caught.value)


def test_the_rank_with_the_least_room_decides() -> None:
    order = SimpleNamespace(all_gather=lambda mine, dim: torch.cat([mine, torch.tensor([7])]))
    ranks: Any = SimpleNamespace(order=order)
    assert (build.least(9, ranks), build.least(3, ranks)) == (7, 3)


@pytest.mark.gpu
def test_on_a_gpu_the_pool_and_the_largest_step_fit(folder: Path) -> None:
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    with Engine(
        folder, device="cuda", mem_fraction_static=0.5, max_running_requests=4096, block_size=16
    ) as engine:
        assert 0 < engine.status().resolved["kv_cache_bytes"] <= 0.5 * free
        prompts = [[7] * 500] * 40
        results = engine.generate(input_ids=prompts, sampling_params=GREEDY)
        assert len({tuple(result["output_ids"]) for result in results}) == 1


def test_a_peak_is_what_a_step_takes_while_it_runs() -> None:
    taken = [0]

    class Allocator(Memory):
        def forget_peak(self) -> None:
            taken[0] = 0

        def taken_bytes(self) -> int:
            return taken[0]

    def step() -> None:
        taken[0] = 123

    taken[0] = 999
    assert measured(Allocator(0, 0, 0), step) == 123
