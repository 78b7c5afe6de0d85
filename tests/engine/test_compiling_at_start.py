"""At start a step is run without its kernels, so that they compile side by side: nothing may need what they compute."""

from __future__ import annotations

import importlib
import pkgutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import rollout_kernels
from rollout.config import EngineConfig
from rollout.engine.loop.build import build_core

triton = pytest.importorskip("triton")
MIXTURE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


@pytest.fixture
def poison() -> Iterator[None]:
    """Memory that nobody has written holds NaN, or the largest integer, which is no index of anything."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(2, dtype=torch.int32).tolist() == [2**31 - 1] * 2
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("qwen3", {}),
        ("qwen3", {"deterministic": True}),
        ("qwen3_moe", {}),
        ("qwen3_moe", {"deterministic": True}),
        ("glm4_moe", {}),
    ],
)
def test_a_step_on_padding_takes_nothing_that_a_kernel_writes_for_an_index(
    family: str,
    options: dict[str, Any],
    tiny_checkpoint: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    poison: None,
) -> None:
    from rollout.runner import cuda_graph_runner as runner

    launched = Counter[str]()

    def leave_out(kernel: Any, *args: Any, grid: Any, warmup: bool, **given: Any) -> None:
        launched[kernel.fn.__name__] += 1

    mixture = {} if family == "qwen3" else MIXTURE
    if family == "glm4_moe":
        mixture = {"n_routed_experts": 8, **mixture}
    folder = tiny_checkpoint(family, head_dim=32, **mixture)
    for module in pkgutil.iter_modules(rollout_kernels.__path__):
        importlib.import_module(
            f"rollout_kernels.{module.name}"
        )  # Their kernels are those of a GPU,
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # whatever the choice of the backend is told.
    monkeypatch.setattr(triton.JITFunction, "run", leave_out)
    config = EngineConfig(
        model_path=str(folder),
        device="cpu",
        attention_backend="triton",
        kv_cache_bytes=4 << 20,
        max_running_requests=16,
        **options,
    )
    graphs = build_core(config).runner.graphs
    assert graphs is not None
    kinds = [
        runner._Kind(size=size, filters=filters, shared=size > 1)
        for size in (1, 8, 16)
        for filters in (False, True)
    ]
    launched.clear()
    graphs._run_padding(kinds)
    assert len(launched) > 8
