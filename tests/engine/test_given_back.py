"""An engine of this process gives back what it mapped by hand of a GPU's memory: where it ends, and where none starts.

Nothing else does: such memory does not go with its tensors. Pages of the process stand in for it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mapped_pages import Pages

from rollout import Engine
from rollout.engine.loop import build
from rollout.errors import RolloutError
from rollout.models import arena
from rollout.runner import kv_pool
from rollout.runner.model_runner import ModelRunner
from weight_sync.devices.driver import DeviceOutOfMemory
from weight_sync.devices.mapped_memory import MappedMemory

OPTIONS: dict[str, Any] = {"device": "cpu", "skip_tokenizer_init": True, "kv_cache_bytes": 1 << 20}
GREEDY = {"temperature": 0.0, "max_new_tokens": 4, "ignore_eos": True}


@pytest.fixture(scope="module")
def folder(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("qwen3", head_dim=32)


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> Pages:
    """Where weights and KV pools are."""
    found = Pages()

    def mapped(num_bytes: int, device: torch.device) -> tuple[torch.Tensor, MappedMemory]:
        try:
            memory = MappedMemory(num_bytes, device, found)
        except DeviceOutOfMemory as error:
            raise torch.OutOfMemoryError(str(error)) from error
        return memory.tensor, memory

    def pool(
        shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> tuple[torch.Tensor, MappedMemory]:
        raw, memory = mapped(torch.Size(shape).numel() * dtype.itemsize, device)
        return raw.view(dtype).view(shape), memory

    monkeypatch.setattr(arena, "mapped_tensor", mapped)
    monkeypatch.setattr(kv_pool, "_memory", pool)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    return found


@pytest.mark.parametrize("released", [[], ["kv_cache"], ["kv_cache", "weights"]])
def test_an_engine_that_ends_gives_its_memory_back(
    released: list[Any], folder: Path, pages: Pages
) -> None:
    with Engine(folder, **OPTIONS) as engine:
        engine.generate(input_ids=[5, 9, 2], sampling_params=GREEDY)
        if released:
            engine.release_memory_occupation(released)
        assert pages.reserved == 2 and len(pages.mapped) == 2 - len(released)
    assert pages.reserved == 0 and pages.mapped == set()


@pytest.mark.parametrize(
    ("owner", "method"),
    [
        (ModelRunner, "init_memory_pool"),
        (ModelRunner, "init_attention_backend"),
        (ModelRunner, "load_model"),
        (ModelRunner, "init_device_graphs"),
        (build, "check_whole_model"),
        (build, "EngineCore"),
    ],
)
def test_an_engine_that_cannot_start_leaves_no_memory_behind(
    owner: Any, method: str, folder: Path, pages: Pages, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        assert pages.reserved > 0
        raise RolloutError("cannot start")

    monkeypatch.setattr(owner, method, fails)
    with pytest.raises(RolloutError, match="cannot start"):
        Engine(folder, **OPTIONS)
    assert pages.reserved == 0 and pages.mapped == set()


def test_parameters_that_do_not_fit_leave_none_behind_either(
    tiny_checkpoint: Callable[..., Path], pages: Pages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of one dtype had found room already."""
    options = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
    folder = tiny_checkpoint("glm4_moe", n_routed_experts=4, **options)
    take = pages.map

    def only_once(address: int, num_bytes: int) -> None:
        pages.full = bool(pages.mapped)
        take(address, num_bytes)

    monkeypatch.setattr(pages, "map", only_once)
    with pytest.raises(RolloutError, match="too little memory"):
        Engine(folder, dtype="bfloat16", **OPTIONS)
    assert pages.full and pages.reserved == 0 and pages.mapped == set()
