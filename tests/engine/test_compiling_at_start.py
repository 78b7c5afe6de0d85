"""At start steps are run without their kernels, so that these compile side by side: all that are needed later, and
nothing may need what they compute."""

from __future__ import annotations

import importlib
import pkgutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import rollout_kernels
from rollout.config import EngineConfig
from rollout.engine.loop.build import build_core
from rollout.engine.loop.core import EngineCore
from rollout.protocol.commands import Generate, PromptSpec
from rollout.sampling_params import SamplingParams
from weight_sync.wire.local_call import LocalCall

triton = pytest.importorskip("triton")
MIXTURE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
CHUNK = 512
FAMILIES = {"qwen3": {}, "qwen3_moe": MIXTURE, "glm4_moe": {"n_routed_experts": 8, **MIXTURE}}


@pytest.fixture
def poison() -> Iterator[None]:
    """Memory that nobody has written holds NaN, or the largest integer, which is no index of anything."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(2, dtype=torch.int32).tolist() == [2**31 - 1] * 2
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> dict[Any, None]:
    """What the compiler would be asked for, while nothing is launched."""
    for module in pkgutil.iter_modules(rollout_kernels.__path__):
        importlib.import_module(
            f"rollout_kernels.{module.name}"
        )  # Their kernels are those of a GPU,
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # whatever the choice of the backend is told.
    found: dict[Any, None] = {}

    def leave_out(kernel: Any, *args: Any, grid: Any, warmup: bool, **given: Any) -> None:
        found[specialised(kernel, args, given)] = None

    monkeypatch.setattr(triton.JITFunction, "run", leave_out)
    return found


def specialised(kernel: Any, args: tuple[Any, ...], given: dict[str, Any]) -> Any:
    """Launches for which this differs are compiled apart."""
    values = {**dict(zip(kernel.arg_names, args, strict=False)), **given}
    found: list[Any] = [kernel.fn.__name__]
    for parameter in kernel.params:
        value = values.pop(parameter.name)
        kind: Any = type(value).__name__
        if parameter.is_constexpr:
            kind = str(value)
        elif isinstance(value, torch.Tensor):
            aligned = value.data_ptr() % 16 == 0 or parameter.do_not_specialize_on_alignment
            kind = (value.dtype, aligned)
        elif isinstance(value, int) and not parameter.do_not_specialize:
            kind = (value == 1, value % 16 == 0, abs(value) < 2**31)
        found.append((parameter.name, kind))
    return (*found, *sorted((name, str(value)) for name, value in values.items()))


def core_of(folder: Path, **options: Any) -> EngineCore:
    core = build_core(
        EngineConfig(
            model_path=str(folder),
            device="cpu",
            attention_backend="triton",
            kv_cache_bytes=16 << 20,
            max_running_requests=16,
            chunked_prefill_size=CHUNK,
            **options,
        )
    )
    core._thread = threading.current_thread()
    return core


def start(core: EngineCore) -> None:
    """As on a GPU."""
    from rollout.runner import cuda_graph_runner as runner

    graphs = core.runner.graphs
    assert graphs is not None
    core.runner.compile_steps(CHUNK, 16, core.config.context_length)
    sizes = graphs._batch_sizes
    kinds = [runner._Kind(size=size, shared=shared) for size in sizes for shared in (False, True)]
    graphs._run_padding(kinds)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_on_padding_takes_nothing_that_a_kernel_writes_for_an_index(
    family: str,
    deterministic: bool,
    tiny_checkpoint: Callable[..., Path],
    poison: None,
    launched: dict[Any, None],
) -> None:
    folder = tiny_checkpoint(family, head_dim=32, **FAMILIES[family])
    core = core_of(folder, deterministic=deterministic)
    start(core)
    assert len({name for name, *_ in launched}) > 8


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_compiled_in_the_first_batch_of_rollouts(
    family: str, tiny_checkpoint: Callable[..., Path], launched: dict[Any, None]
) -> None:
    core = core_of(tiny_checkpoint(family, head_dim=32, **FAMILIES[family]))
    start(core)
    before = set(launched)
    launched.clear()
    calls = []
    for options in ({"temperature": 1.0}, {"temperature": 0.0}, {"top_p": 0.9, "top_k": 40}):
        params = SamplingParams(n=4, max_new_tokens=9, ignore_eos=True, **options)
        prompts = [
            PromptSpec(rid=f"{len(calls)}/{i}", input_ids=ids, params=params, return_logprob=True)
            for i, ids in enumerate(([5] * 300, [6] * 40, [7], [5] * 200))
        ]
        calls.append(LocalCall(Generate(prompts=prompts), time.monotonic() + 60))
        core.submit(calls[-1])
    for _ in range(200):
        if not all(call.future.done() for call in calls):
            core.turn()
    assert all(call.future.done() for call in calls)
    late = "\n".join(
        str(differences(launch, before)) for launch in launched if launch not in before
    )
    assert late == ""


def differences(late: Any, before: set[Any]) -> Any:
    """Between a launch and the one before that is most like it."""
    alike = [launch for launch in before if launch[0] == late[0]]
    all_of = [
        [pair for pair in zip(late, launch, strict=True) if pair[0] != pair[1]] for launch in alike
    ]
    return late[0], min(all_of, key=len, default=None)
