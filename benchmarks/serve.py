"""`rollout bench serve`: what HTTP costs, with token ids in and out, next to the same engine called in process."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import msgspec

from rollout import Engine
from rollout.server import launch_server_process

from .http_client import HttpConnection
from .results import BenchResult, Headline, Table, summary
from .screen import Screen
from .settings import ServeBench
from .shapes import model_folder

TARGET = 0.15
"""Largest share of the throughput that HTTP may cost."""
_BLOCK = 16
Ask = dict[str, Any]


def run_serve(settings: ServeBench, screen: Screen) -> BenchResult:
    """One engine in a process of its own; the same requests in process and over HTTP, in turns."""
    context = settings.prompt_tokens + settings.new_tokens
    model = settings.model
    token_bytes = 2 * model.num_layers * model.num_kv_heads * model.head_dim * 4
    options: dict[str, Any] = {
        "load_format": "dummy",
        "await_first_update": False,
        "skip_tokenizer_init": True,
        "enable_prefix_cache": False,  # Each round computes everything.
        "max_running_requests": settings.concurrency,
        "kv_cache_bytes": settings.concurrency * (context + 2 * _BLOCK) * token_bytes,
    }
    screen.say(f"one engine, and {settings.concurrency} clients of it")
    with (
        model_folder(model, "float32", context + 1) as folder,
        Engine(folder, executor="local", **options) as engine,
        launch_server_process(address=engine.address, server={"port": 0}) as server,
    ):
        seconds, waits = asyncio.run(_measure(settings, screen, engine, server.url))
    numbers = _numbers(settings, seconds, waits)
    return BenchResult(
        benchmark="serve",
        config={"settings": settings, "client": "one process, a kept connection per request"},
        numbers=numbers,
        headline=_headline(settings, numbers),
        tables=(_table(numbers),),
    )


def _asks(settings: ServeBench) -> list[Ask]:
    rng = random.Random(settings.seed)
    params = {"max_new_tokens": settings.new_tokens, "ignore_eos": True, "temperature": 1.0}
    return [
        {
            "input_ids": [
                rng.randrange(settings.model.vocab_size) for _ in range(settings.prompt_tokens)
            ],
            "sampling_params": {**params, "sampling_seed": i},
            "return_logprob": True,
        }
        for i in range(settings.concurrency)
    ]


async def _measure(
    settings: ServeBench, screen: Screen, engine: Engine, url: str
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of each round, and of each wait for a token of streams."""
    asks = _asks(settings)
    seconds: dict[str, list[float]] = {"in process": [], "http": []}
    waits: dict[str, list[float]] = {
        f"{where}, {kind}": [] for where in seconds for kind in ("first token", "next token")
    }
    async with AsyncExitStack() as stack:
        lines = [await stack.enter_async_context(HttpConnection(url)) for _ in asks]

        async def whole(i: int) -> int:
            result = await engine.async_generate(**asks[i])
            return len(result["output_ids"])

        async def whole_http(i: int) -> int:
            result = await lines[i].post("/generate", asks[i])
            return len(result["output_ids"])

        async def stream(i: int) -> AsyncIterator[Any]:
            return await engine.async_generate(**asks[i], stream=True)

        async def stream_http(i: int) -> AsyncIterator[Any]:
            return lines[i].events("/generate", {**asks[i], "stream": True})

        ways: dict[str, tuple[Callable[[int], Awaitable[int]], Any]] = {
            "in process": (whole, stream),
            "http": (whole_http, stream_http),
        }
        total = 2 * (settings.warmup + settings.rounds) + 2
        with screen.progress("in process and over HTTP, in turns", total) as advance:
            for number in range(settings.warmup + settings.rounds):
                for name, (one, _) in ways.items():
                    took = await _round(settings, one)
                    if number >= settings.warmup:
                        seconds[name].append(took)
                    advance(f"{name}: {settings.output_tokens / took:,.0f} tokens/s")
            for name, (_, streaming) in ways.items():
                first, following = await _streams(settings, streaming)
                waits[f"{name}, first token"] += first
                waits[f"{name}, next token"] += following
                advance("")
    return seconds, waits


async def _round(settings: ServeBench, one: Callable[[int], Awaitable[int]]) -> float:
    start = time.perf_counter()
    lengths = await asyncio.gather(*(one(i) for i in range(settings.concurrency)))
    took = time.perf_counter() - start
    if sum(lengths) != settings.output_tokens:
        raise AssertionError(f"got {sum(lengths)} tokens, expected {settings.output_tokens}")
    return took


async def _streams(settings: ServeBench, stream: Any) -> tuple[list[float], list[float]]:
    """Seconds until each first token, and between tokens."""
    first: list[float] = []
    following: list[float] = []

    async def one(i: int) -> None:
        last = time.perf_counter()
        is_first = True
        async for _ in await stream(i):
            now = time.perf_counter()
            (first if is_first else following).append(now - last)
            last, is_first = now, False

    await asyncio.gather(*(one(i) for i in range(settings.concurrency)))
    return first, following


def _numbers(
    settings: ServeBench, seconds: dict[str, list[float]], waits: dict[str, list[float]]
) -> dict[str, Any]:
    pairs = zip(seconds["in process"], seconds["http"], strict=True)
    return {
        "output_tokens": settings.output_tokens,
        "in_process_tokens_per_s": summary(
            [settings.output_tokens / s for s in seconds["in process"]]
        ),
        "http_tokens_per_s": summary([settings.output_tokens / s for s in seconds["http"]]),
        "cost": summary([1 - inside / http for inside, http in pairs]),
        "waits_s": {name: summary(values) for name, values in waits.items()},
        "request_bytes": statistics.fmean(len(msgspec.json.encode(ask)) for ask in _asks(settings)),
    }


def _headline(settings: ServeBench, numbers: dict[str, Any]) -> tuple[Headline, ...]:
    cost = numbers["cost"]["p50"]
    return (
        Headline(
            what=f"output tokens/s over HTTP, {settings.concurrency} requests at once, token ids in and out",
            measured=f"{numbers['http_tokens_per_s']['p50']:,.0f}/s",
            floor=f"{numbers['in_process_tokens_per_s']['p50']:,.0f}/s (the same engine, in process)",
            ratio=f"{1 - cost:.2f}",
            target=f"at least {1 - TARGET:g}",
            met=cost <= TARGET,
        ),
    )


def _table(numbers: dict[str, Any]) -> Table:
    rows = [
        (name, *(f"{1e3 * series[key]:.1f}" for key in ("p10", "p50", "p90", "p99", "max")))
        for name, series in numbers["waits_s"].items()
    ]
    return (
        "milliseconds that a streaming client waits",
        ("", "p10", "p50", "p90", "p99", "max"),
        rows,
    )
