"""`rollout bench gpu experts`: decode steps and prefill of a mixture of experts, and its kernels alone, with floors.

The floor of a decode step is the time in which the device reads the experts that the batch goes to, all other weights
and the keys and values of each request, all once, at the rate of a plain read, measured here. How many experts a batch
goes to follows from how often each was chosen in a record (`start_expert_distribution_record`): tokens of different
requests choose as if by themselves.
"""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np
import torch

from rollout import Engine

from .gpu_generate import SKIPPED, Workload, decode_row, read_rate
from .results import BenchResult, Headline, Table
from .screen import Screen
from .settings import GpuExpertsBench
from .shapes import DTYPES, model_folder

_RECORDED = 64
"""Requests whose experts are counted."""


def run_gpu_experts(settings: GpuExpertsBench, screen: Screen) -> BenchResult:
    """The kernels alone, then an engine: warm up, count experts, decode, prefill."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    numbers: dict[str, Any] = {"kernels": _kernels(settings, screen, device)}
    if device.type == "cuda":
        torch.cuda.empty_cache()
    rate = read_rate(device)
    numbers |= {"read_bytes_per_s": rate, "decode": {}}
    context = max(settings.prompt_tokens + settings.decode_tokens, settings.prefill_tokens) + 1
    with model_folder(settings.model, settings.dtype, context) as folder:
        screen.say(f"starting an engine on {device}")
        start = time.perf_counter()
        with Engine(
            str(folder),
            device=device.type,
            load_format="dummy",
            await_first_update=False,
            skip_tokenizer_init=True,
            attention_backend=settings.attention_backend,
            max_running_requests=max(settings.batch_sizes),
            chunked_prefill_size=settings.chunked_prefill_size,
            kv_cache_bytes=int(settings.kv_cache_gb * 1e9),
        ) as engine:
            numbers["start_s"] = time.perf_counter() - start
            workload = Workload(engine, settings)
            engine.start_expert_distribution_record()
            workload.decode(min(_RECORDED, max(settings.batch_sizes)))
            counts = engine.dump_expert_distribution_record()
            engine.stop_expert_distribution_record()
            with screen.progress("decode, prefill", len(settings.batch_sizes) + 1) as advance:
                for batch in settings.batch_sizes:
                    step = workload.decode(batch)
                    touched = experts_touched(counts, settings.model.top_k, batch)
                    step["experts_per_layer"] = touched
                    step["floor_ms"] = 1e3 * floor_bytes(settings, batch, touched) / rate
                    numbers["decode"][batch] = step
                    advance(f"batch {batch}: {step['p50_ms']:.2f} ms")
                workload.prefill()  # compiles what is not compiled yet
                numbers["prefill"] = workload.prefill()
                advance(f"prefill: {numbers['prefill']['tokens_per_s']:,.0f} tokens/s")
    return BenchResult(
        benchmark="gpu-experts",
        config={"settings": settings},
        numbers=numbers,
        headline=_headline(settings, numbers),
        device=torch.cuda.get_device_name(0) if device.type == "cuda" else "cpu",
        tables=_tables(numbers),
        has_picture=True,
    )


def experts_touched(counts: np.ndarray[Any, Any], top_k: int, batch: int) -> float:
    """Mean over the layers of how many experts `batch` tokens go to; counts (layers, experts)."""
    chances = counts * (top_k / counts.sum(1, keepdims=True))
    return float((1 - (1 - chances.clip(max=1)) ** batch).sum(1).mean())


def floor_bytes(settings: GpuExpertsBench, batch: int, touched: float) -> float:
    """Bytes that a decode step must read."""
    model, width = settings.model, DTYPES[settings.dtype].itemsize
    heads = (2 * model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    experts = 3 * touched * model.expert_size
    layer = model.hidden_size * (heads + model.num_experts + experts)
    weights = model.vocab_size * model.hidden_size + model.num_layers * layer
    tokens = settings.prompt_tokens + (SKIPPED + settings.decode_tokens) / 2
    cached = 2 * model.num_layers * model.num_kv_heads * model.head_dim * tokens
    return width * (weights + batch * cached)


def _kernels(
    settings: GpuExpertsBench, screen: Screen, device: torch.device
) -> dict[int, dict[str, Any]]:
    if not settings.kernel_tokens or not _can_launch(device):
        return {}
    from .expert_kernels import Calls, Layer, measure_rates, stored_config

    model, dtype = settings.model, DTYPES[settings.dtype]
    rates = measure_rates(device, dtype)
    layer = Layer.make(model.hidden_size, model.expert_size, model.num_experts, model.top_k, dtype)
    found = {}
    with screen.progress("kernels", len(settings.kernel_tokens)) as advance:
        for size in settings.kernel_tokens:
            calls = Calls(layer, size)
            found[size] = calls.parts(stored_config(calls), rates)
            advance(f"{size} tokens: {found[size]['us']['all']:.1f} us")
    return found


def _can_launch(device: torch.device) -> bool:
    """On CUDA, and in triton's interpreter."""
    return device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


def _headline(settings: GpuExpertsBench, numbers: dict[str, Any]) -> tuple[Headline, ...]:
    floor = "experts, other weights and KV read once"
    return (
        decode_row("mixture", settings.prompt_tokens, numbers["decode"], floor),
        Headline(
            what="mixture: prefill", measured=f"{numbers['prefill']['tokens_per_s']:,.0f} tokens/s"
        ),
    )


def _tables(numbers: dict[str, Any]) -> tuple[Table, ...]:
    kernel_rows: list[tuple[str, ...]] = [
        (
            f"{size} tokens, {found['touched']:.0f} experts",
            *(
                f"{us:.1f}"
                + (f" / {found['floor_us'][name]:.1f}" if name in found["floor_us"] else "")
                for name, us in found["us"].items()
            ),
            f"{found['floor_us']['all'] / found['us']['all']:.0%}",
        )
        for size, found in numbers["kernels"].items()
    ]
    columns = ("", "choose", "sort", "gate, up", "down", "all but choose", "share of floor")
    engine_rows: list[tuple[str, ...]] = [
        (
            f"decode, batch {batch}",
            f"{step['p50_ms']:.2f} ms",
            f"{step['p99_ms']:.2f} ms",
            f"{step['floor_ms']:.2f} ms",
            f"{step['floor_ms'] / step['p50_ms']:.0%}",
        )
        for batch, step in numbers["decode"].items()
    ]
    engine_rows.append(
        ("prefill", f"{numbers['prefill']['tokens_per_s']:,.0f} tokens/s", *[""] * 3)
    )
    engine_rows.append(("start", f"{numbers['start_s']:.1f} s", *[""] * 3))
    engine: Table = ("engine", ("", "median", "p99", "floor", "share of floor"), engine_rows)
    if not kernel_rows:
        return (engine,)
    return (("kernels alone, us / floor", columns, kernel_rows), engine)
