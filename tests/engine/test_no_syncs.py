"""Inside a step nothing waits for the device: no value is read from it, and what it needs goes there in one copy.

On a CPU the kernels are left out and what the host does around them is counted; on a GPU torch itself refuses to wait.
"""

from __future__ import annotations

import importlib
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rollout import Engine
from rollout.config import EngineConfig
from rollout.engine.loop.build import build_core
from rollout.engine.loop.core import EngineCore
from rollout.engine.prepare import prepare
from weight_sync.wire.local_call import LocalCall

KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 1.0},
    "nucleus": {"temperature": 0.8, "top_p": 0.9, "top_k": 40, "min_p": 0.01},
    "penalties": {"frequency_penalty": 0.5, "repetition_penalty": 1.2},
    "bias": {"logit_bias": {5: 1.0}, "min_new_tokens": 3},
    "stop strings": {"stop": ["no such words"]},
}
READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique"}


@pytest.fixture(scope="module")
def folder(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("qwen3", head_dim=32)


class CountingMode(TorchDispatchMode):
    """Counts operations that would make the host wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in READS:
            self.reads[name] += 1
        return func(*args, **(kwargs or {}))


def core_without_kernels(
    folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> EngineCore:
    """An engine loop, one step ahead, that does everything but launch what a device computes."""
    from rollout.layers import device_scores
    from rollout.layers.device_sampler import DeviceSampler
    from rollout.runner.model_runner import ModelRunner

    # Kernels that are imported before stay those of a GPU, for tests that follow.
    importlib.import_module("rollout.runner.cuda_graph_runner")
    monkeypatch.setenv("TRITON_INTERPRET", "1")

    def hidden(self: ModelRunner, batch: Any, drawn: Any = None) -> torch.Tensor:
        return torch.zeros(batch.num_tokens, self.model_config.hidden_size)

    monkeypatch.setattr(ModelRunner, "forward", hidden)
    monkeypatch.setattr(DeviceSampler, "run", lambda self, *args, **kwargs: None)
    for kernel in ("compute_stats", "gather_logprobs", "top_logprobs"):
        monkeypatch.setattr(device_scores, kernel, lambda *args, **kwargs: None)
    core = build_core(
        EngineConfig(
            model_path=str(folder),
            device="cpu",
            attention_backend="triton",
            overlap=True,
            kv_cache_bytes=4 << 20,
            **options,
        )
    )
    core._thread = threading.current_thread()
    return core


SCORED: dict[str, dict[str, Any]] = {
    "prompt": {"logprob_start_len": 0},
    "most likely": {"logprob_start_len": 0, "top_logprobs_num": 3},
    "chosen": {"logprob_start_len": 0, "token_ids_logprob": [7, 8]},
}


@pytest.mark.parametrize("kind", SCORED)
def test_scores_of_prompts_are_read_after_the_next_step_is_launched(
    kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    from rollout.layers.device_scores import DeviceScores
    from rollout.runner.model_runner import ModelRunner

    news: list[str] = []
    asked, read, launch = DeviceScores.__init__, DeviceScores.result, ModelRunner.launch

    def noted(what: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            news.append(what)
            return function(*args, **kwargs)

        return run

    monkeypatch.setattr(DeviceScores, "__init__", noted("ask", asked))
    monkeypatch.setattr(DeviceScores, "result", noted("read", read))
    monkeypatch.setattr(ModelRunner, "launch", noted("launch", launch))
    core = core_without_kernels(folder, monkeypatch, chunked_prefill_size=16)
    core.submit(generate_call([[4] * 60], {"max_new_tokens": 1}, **SCORED[kind]))
    core.turn()
    with CountingMode() as mode:
        for _ in range(3):
            assert core.step()
    assert not mode.reads
    # The last piece also draws a token, whose own scores are asked for where the prompt's are more than values.
    last = ["ask"] if kind == "prompt" else ["ask", "ask"]
    assert news == ["launch", "ask", *["launch", "read", "ask"] * 2, "launch", "read", *last]
    core.step()
    assert news[-len(last) :] == ["read"] * len(last)


@pytest.mark.parametrize("kind", KINDS)
def test_a_decode_step_reads_nothing_and_uploads_once(
    kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    from rollout.runner.cuda_graph_runner import CudaGraphRunner
    from rollout.runner.staging import Staging

    uploads = Counter[str]()
    upload = Staging.upload

    def counted(self: Staging, *args: Any, **kwargs: Any) -> Any:
        uploads["all"] += 1
        return upload(self, *args, **kwargs)

    monkeypatch.setattr(Staging, "upload", counted)
    monkeypatch.setattr(CudaGraphRunner, "_body", lambda self, kind, inputs: None)
    core = core_without_kernels(folder, monkeypatch)
    call = generate_call(
        [[1, 2, 3], [4] * 40], {"max_new_tokens": 60, "ignore_eos": True, **KINDS[kind]}
    )
    core.submit(call)
    for _ in range(3):  # the command and the prompts, and the first decode step
        core.turn()
    uploads.clear()
    with CountingMode() as mode:
        for _ in range(20):
            assert core.step()
    assert not mode.reads
    # Penalties and biases are drawn with in a second launch, which has parameters of its own.
    assert uploads["all"] <= (40 if kind in ("penalties", "bias") else 20)


def generate_call(prompts: list[list[int]], params: dict[str, Any], **options: Any) -> LocalCall:
    """A command as the engine's client makes it."""
    prepared = prepare(
        None,
        prompt=None,
        input_ids=prompts,
        sampling_params=params,
        stream=False,
        rid=None,
        return_text_in_logprobs=False,
        others={},
        per_prompt={
            "return_logprob": True,
            "logprob_start_len": -1,
            "top_logprobs_num": 0,
            "token_ids_logprob": None,
            "return_token_times": False,
            **options,
        },
    )
    return LocalCall(prepared.command, time.monotonic() + 60)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [*KINDS, *SCORED])
def test_torch_finds_nothing_on_a_gpu_that_waits(kind: str, folder: Path) -> None:
    check_nothing_waits(kind, folder)


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["qwen3_moe", "glm4_moe"])
def test_nor_in_a_mixture_of_experts(family: str, tiny_checkpoint: Callable[..., Path]) -> None:
    sizes = {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 32}
    number = "num_experts" if family == "qwen3_moe" else "n_routed_experts"
    folder = tiny_checkpoint(family, **sizes, **{number: 8})
    check_nothing_waits("nucleus", folder)
    check_nothing_waits("nucleus", folder, disable_cuda_graph=True)


def check_nothing_waits(kind: str, folder: Path, **options: Any) -> None:
    """Once kernels are compiled, a whole call is made while torch refuses to wait."""
    params = {"max_new_tokens": 40, "ignore_eos": True, **KINDS.get(kind, {})}
    options |= {"device": "cuda", "dtype": "bfloat16", "kv_cache_bytes": 8 << 20}
    with Engine(folder, **options) as engine:

        def run() -> None:
            engine.generate(
                input_ids=[[1, 2, 3], [4] * 40],
                sampling_params=params,
                return_logprob=True,
                **SCORED.get(kind, {}),
            )

        run()  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"overlap": False}, {"disable_cuda_graph": True}], ids=str)
def test_a_gpu_draws_the_tokens_of_a_cpu(options: dict[str, Any], folder: Path) -> None:
    def run(**where: Any) -> list[Any]:
        with Engine(folder, dtype="float32", kv_cache_bytes=8 << 20, **where) as engine:
            results: list[Any] = engine.generate(
                input_ids=[[7, 8, 9]] * len(KINDS),
                sampling_params=[
                    {"max_new_tokens": 30, "sampling_seed": 5, **kind} for kind in KINDS.values()
                ],
                return_logprob=True,
            )
        return results

    for cpu, gpu in zip(run(device="cpu"), run(device="cuda", **options), strict=True):
        assert gpu["output_ids"] == cpu["output_ids"]
        got, want = (
            [value for value, _, _ in result["meta_info"]["output_token_logprobs"]]
            for result in (gpu, cpu)
        )
        assert got == pytest.approx(want, abs=1e-3)
