"""`rollout bench gpu generate`: decode steps, prefill and the RL shape on one device, beside what its memory allows.

The floor of a decode step is the time in which the device reads the weights and the keys and values of each request,
all once, at the rate of a plain read of its memory, measured here; with several ranks each device reads its part.
"""

from __future__ import annotations

import itertools
import math
import random
import statistics
import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from rollout import Engine

from .results import BenchResult, Headline, Table
from .screen import Screen
from .settings import GpuExpertsBench, GpuGenerateBench, ModelShape
from .shapes import DTYPES, model_folder

SKIPPED = 16
"""First steps of a decode that are not counted."""


def run_gpu_generate(settings: GpuGenerateBench, screen: Screen) -> BenchResult:
    """Start an engine, warm up, then everything once."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rate = read_rate(torch.device(device))
    context = max(
        settings.prompt_tokens + max(settings.decode_tokens, settings.rl_max_tokens),
        settings.prefill_tokens + 1,
    )
    numbers: dict[str, Any] = {
        "model": model_name(settings),
        "read_bytes_per_s": rate,
        "decode": {},
    }
    with model_folder(settings.model, settings.dtype, context) as folder:
        screen.say(f"starting an engine on {device}")
        start = time.perf_counter()
        with Engine(
            str(folder),
            device=device,
            load_format="dummy",
            await_first_update=False,
            skip_tokenizer_init=True,
            max_running_requests=max(
                *settings.batch_sizes, settings.rl_prompts * settings.rl_samples
            ),
            chunked_prefill_size=settings.chunked_prefill_size,
            kv_cache_bytes=int(settings.kv_cache_gb * 1e9),
            deterministic=settings.deterministic,
            tp_size=settings.tp_size,
            executor="local" if settings.tp_size > 1 else "inline",
            disable_custom_all_reduce=settings.disable_custom_all_reduce,
        ) as engine:
            numbers["start_s"] = time.perf_counter() - start
            screen.say(f"started in {numbers['start_s']:.1f} s")
            workload = Workload(engine, settings)
            workload.decode(min(settings.batch_sizes))  # compiles what is not compiled yet
            with screen.progress("decode, prefill, RL", len(settings.batch_sizes) + 2) as advance:
                for batch in settings.batch_sizes:
                    step = workload.decode(batch)
                    step["floor_ms"] = 1e3 * floor_bytes(settings, batch) / rate / settings.tp_size
                    numbers["decode"][batch] = step
                    advance(f"batch {batch}: {step['p50_ms']:.2f} ms")
                numbers["prefill"] = workload.prefill()
                advance(f"prefill: {numbers['prefill']['tokens_per_s']:,.0f} tokens/s")
                numbers["rl"] = workload.rl(settings)
                advance(f"RL: {numbers['rl']['tokens_per_s']:,.0f} tokens/s")
    return BenchResult(
        benchmark="gpu-generate",
        config={"settings": settings},
        numbers=numbers,
        headline=_headline(settings, numbers),
        device=_devices(settings.tp_size) if device == "cuda" else "cpu",
        tables=(_table(numbers, settings.tp_size),),
        has_picture=True,
    )


class Workload:
    """What is measured, on one engine."""

    def __init__(self, engine: Engine, settings: GpuGenerateBench | GpuExpertsBench) -> None:
        self._engine = engine
        self._settings = settings
        self._rng = random.Random(settings.seed)

    def decode(self, batch: int) -> dict[str, float]:
        """Milliseconds from one token of a request to its next, with `batch` requests."""
        settings = self._settings
        outputs = self._generate(
            [self._prompt(settings.prompt_tokens) for _ in range(batch)],
            [{"max_new_tokens": settings.decode_tokens}] * batch,
            return_token_times=True,
        )
        # The step of a token is the same for all; the last request to join sees only whole batches.
        times = [output["meta_info"]["token_times"] for output in outputs]
        latest = max(times, key=lambda series: series[0])[SKIPPED:]
        end = min(series[-1] for series in times)
        gaps = [b - a for a, b in itertools.pairwise(latest) if b <= end]
        ordered = sorted(gaps)
        return {
            "p50_ms": 1e3 * statistics.median(ordered),
            "mean_ms": 1e3 * statistics.fmean(ordered),
            "p99_ms": 1e3 * ordered[int(0.99 * (len(ordered) - 1))],
            "steps": len(ordered),
        }

    def prefill(self) -> dict[str, float]:
        """Prompt tokens per second."""
        settings = self._settings
        prompts = [self._prompt(settings.prefill_tokens) for _ in range(settings.prefill_prompts)]
        start = time.perf_counter()
        self._generate(prompts, [{"max_new_tokens": 1}] * len(prompts))
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "tokens_per_s": sum(map(len, prompts)) / seconds}

    def rl(self, settings: GpuGenerateBench) -> dict[str, float]:
        """Output tokens per second of a batch of groups, and how much of the time the last tenth of tokens takes."""
        prompts = [self._prompt(settings.prompt_tokens) for _ in range(settings.rl_prompts)]
        inputs = [prompt for prompt in prompts for _ in range(settings.rl_samples)]
        lengths = [self._geometric(settings) for _ in inputs]
        start = time.perf_counter()
        self._engine.generate(
            input_ids=inputs,
            sampling_params=[
                {"max_new_tokens": n, "ignore_eos": True, "temperature": 1.0} for n in lengths
            ],
            return_logprob=True,
        )
        seconds = time.perf_counter() - start
        return {
            "seconds": seconds,
            "output_tokens": sum(lengths),
            "longest": max(lengths),
            "tokens_per_s": sum(lengths) / seconds,
        }

    def _generate(
        self, prompts: Sequence[list[int]], params: Sequence[dict[str, Any]], **options: Any
    ) -> list[dict[str, Any]]:
        outputs: list[dict[str, Any]] = self._engine.generate(
            input_ids=prompts,
            sampling_params=[{"ignore_eos": True, "temperature": 1.0, **p} for p in params],
            return_logprob=True,
            **options,
        )
        return outputs

    def _prompt(self, length: int) -> list[int]:
        vocab = self._settings.model.vocab_size
        return [self._rng.randrange(vocab) for _ in range(length)]

    def _geometric(self, settings: GpuGenerateBench) -> int:
        goes_on = math.log1p(-1.0 / settings.rl_mean_tokens)
        length = 1 + int(math.log1p(-self._rng.random()) / goes_on)
        return min(length, settings.rl_max_tokens)


def floor_bytes(settings: GpuGenerateBench, batch: int) -> float:
    """Bytes that a decode step must read: all weights, and the keys and values of each request, half-way through."""
    model, width = settings.model, DTYPES[settings.dtype].itemsize
    tokens = settings.prompt_tokens + (SKIPPED + settings.decode_tokens) / 2
    kv_bytes = 2 * model.num_layers * model.num_kv_heads * model.head_dim * width
    return width * num_parameters(model) + batch * tokens * kv_bytes


def num_parameters(model: ModelShape) -> int:
    """Elements of all weights; the head is the embedding."""
    heads = (2 * model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    layer = model.hidden_size * (heads + 3 * model.intermediate_size)
    return model.vocab_size * model.hidden_size + model.num_layers * layer


def model_name(settings: GpuGenerateBench) -> str:
    """Parameters in billions, and what is special."""
    model = settings.model
    head = 0 if model.tied else model.vocab_size * model.hidden_size
    words = [f"{(num_parameters(model) + head) / 1e9:.1g}B", settings.dtype]
    words += ["deterministic"] if settings.deterministic else []
    words += [f"{settings.tp_size} GPUs"] if settings.tp_size > 1 else []
    return ", ".join(words)


def read_rate(device: torch.device) -> float:
    """Bytes per second of a pass that only reads a large buffer."""
    on_cuda = device.type == "cuda"
    data = torch.ones(1 << (30 if on_cuda else 24), dtype=torch.int32, device=device)
    best = math.inf
    for _ in range(5):
        if on_cuda:
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        data.amax()
        if on_cuda:
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return data.nbytes / best


def _devices(num: int) -> str:
    name: str = torch.cuda.get_device_name(0)
    return name if num == 1 else f"{num} x {name}"


def decode_row(
    name: str, prompt_tokens: int, decode: dict[int, dict[str, float]], floor: str
) -> Headline:
    """Steps of all batches in one row; `floor` is what a step must do."""
    steps = list(decode.values())

    def joined(values: Iterable[float]) -> str:
        return " / ".join(f"{value:.2f}" for value in values)

    return Headline(
        what=f"{name}: decode after {prompt_tokens} tokens, ms a step at batch {' / '.join(map(str, decode))}",
        measured=joined(step["p50_ms"] for step in steps),
        floor=f"{joined(step['floor_ms'] for step in steps)} ({floor})",
        ratio=joined(step["p50_ms"] / step["floor_ms"] for step in steps),
    )


def _headline(settings: GpuGenerateBench, numbers: dict[str, Any]) -> tuple[Headline, ...]:
    name, rl = numbers["model"], numbers["rl"]
    shape = f"{settings.rl_prompts} prompts of {settings.prompt_tokens} x {settings.rl_samples}"
    floor = "weights and KV read once"
    return (
        decode_row(name, settings.prompt_tokens, numbers["decode"], floor),
        Headline(
            what=f"{name}: RL shape, {shape}",
            measured=f"{rl['tokens_per_s']:,.0f} output tokens/s",
        ),
    )


def _table(numbers: dict[str, Any], num_devices: int) -> Table:
    rows: list[tuple[str, ...]] = [
        (
            f"decode, batch {batch}",
            f"{step['p50_ms']:.2f} ms",
            f"{step['p99_ms']:.2f} ms",
            f"{step['floor_ms']:.2f} ms",
            f"{step['floor_ms'] / step['p50_ms']:.0%}",
        )
        for batch, step in numbers["decode"].items()
    ]
    prefill, rl = numbers["prefill"], numbers["rl"]
    rows.append(("prefill", f"{prefill['tokens_per_s']:,.0f} tokens/s", "", "", ""))
    rows.append(("RL shape", f"{rl['tokens_per_s']:,.0f} tokens/s", "", "", ""))
    rows.append(("start", f"{numbers['start_s']:.1f} s", "", "", ""))
    what = "one device" if num_devices == 1 else f"{num_devices} devices"
    return (what, ("", "median", "p99", "floor", "share of floor"), rows)
