"""`rollout bench generate`: output tokens per second of the engine and of transformers, and where the time goes."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from rollout import Engine
from rollout.config import EngineConfig
from rollout.engine.prepare import prepare

from .peer import make_checkpoint, run_batch
from .phases import profile_run
from .results import BenchResult, Headline, Table, summary
from .screen import Screen
from .settings import GenerateBench
from .workload import Job, make_jobs, representative, sampling

TARGET = 5.0
"""Least ratio of the two rates."""
_BLOCK = 16


def run_generate(settings: GenerateBench, screen: Screen) -> BenchResult:
    """Engine and peer in turns, in one process with the same threads and weights; then the profile."""
    jobs = make_jobs(settings)
    context = settings.max_prompt_tokens + settings.max_new_tokens
    with TemporaryDirectory(prefix="rollout-bench-") as folder:
        peer = make_checkpoint(settings, Path(folder), context)
        config = _engine_config(settings, folder, context)
        ours, theirs = _in_turns(settings, screen, config, peer, jobs)
        screen.say("the profile")
        command = prepare(None, **_prepared(settings, jobs)).command
        profile = profile_run(config, command)
    numbers = _numbers(jobs, ours, theirs)
    numbers["parameters"] = sum(parameter.numel() for parameter in peer.parameters())
    numbers["profile"] = {**profile, **_share_of_peak(profile)}
    return BenchResult(
        benchmark="generate",
        config={
            "settings": settings,
            "num_threads": torch.get_num_threads(),
            "peer_is_measured_on": "one batch of each size: evenly spread quantiles of the output lengths",
        },
        numbers=numbers,
        headline=_headline(numbers, settings),
        tables=(_table(numbers["profile"]),),
        has_picture=True,
    )


def _engine_config(settings: GenerateBench, folder: str, context: int) -> EngineConfig:
    model = settings.model
    width = 8 if settings.dtype == "float64" else 4 if settings.dtype == "float32" else 2
    token_bytes = 2 * model.num_layers * model.num_kv_heads * model.head_dim * width
    tokens = settings.prompts * settings.samples * (context + _BLOCK)
    return EngineConfig(
        model_path=folder,
        skip_tokenizer_init=True,
        dtype=settings.dtype,
        max_running_requests=settings.max_running_requests,
        kv_cache_bytes=min(tokens * token_bytes, 4 << 30),
    )


def _in_turns(
    settings: GenerateBench, screen: Screen, config: EngineConfig, peer: Any, jobs: Sequence[Job]
) -> tuple[list[float], dict[int, dict[str, Any]]]:
    """Seconds of the engine's runs over all jobs, and what the peer did with a batch of each size."""
    ours: list[float] = []
    theirs: dict[int, dict[str, Any]] = {}
    sizes = settings.peer_batch_sizes
    options = {
        name: getattr(config, name)
        for name in ("skip_tokenizer_init", "dtype", "max_running_requests", "kv_cache_bytes")
    }
    num_tokens = sum(job.num_new for job in jobs)
    total = 2 * len(sizes) + 2
    with (
        Engine(config.model_path, **options) as engine,
        screen.progress("engine and transformers in turns", total) as advance,
    ):
        _run_engine(engine, settings, jobs[: settings.prompts])  # warm-up
        run_batch(peer, settings, [Job(prompt=job.prompt[:8], num_new=4) for job in jobs[:8]])
        advance("")
        for size in sizes:
            ours.append(_run_engine(engine, settings, jobs))
            advance(f"engine {num_tokens / ours[-1]:,.0f} tokens/s")
            batch = representative(jobs, size)
            seconds = run_batch(peer, settings, batch)
            useful = sum(job.num_new for job in batch)
            theirs[size] = {
                "seconds": seconds,
                "useful_tokens": useful,
                "padded_tokens": len(batch) * max(job.num_new for job in batch),
                "tokens_per_s": useful / seconds,
            }
            advance(f"transformers, batch {size}: {useful / seconds:,.0f} tokens/s")
        ours.append(_run_engine(engine, settings, jobs))
        advance("")
    return ours, theirs


def _prepared(settings: GenerateBench, jobs: Sequence[Job]) -> dict[str, Any]:
    return {
        "prompt": None,
        "input_ids": [job.prompt for job in jobs],
        "sampling_params": [sampling(settings, job) for job in jobs],
        "stream": False,
        "rid": None,
        "return_text_in_logprobs": False,
        "others": {},
        "per_prompt": {
            "return_logprob": False,
            "logprob_start_len": -1,
            "top_logprobs_num": 0,
            "token_ids_logprob": None,
            "return_token_times": False,
        },
    }


def _run_engine(engine: Engine, settings: GenerateBench, jobs: Sequence[Job]) -> float:
    engine.flush_cache()  # every run computes its prompts anew
    gc.collect()
    start = time.perf_counter()
    results = engine.generate(
        input_ids=[job.prompt for job in jobs],
        sampling_params=[sampling(settings, job) for job in jobs],
    )
    seconds = time.perf_counter() - start
    assert [len(result["output_ids"]) for result in results] == [job.num_new for job in jobs]
    return seconds


def _numbers(
    jobs: Sequence[Job], ours: Sequence[float], theirs: dict[int, dict[str, Any]]
) -> dict[str, Any]:
    num_tokens = sum(job.num_new for job in jobs)
    rate = summary([num_tokens / seconds for seconds in ours])
    best = max(theirs, key=lambda size: theirs[size]["tokens_per_s"])
    return {
        "output_tokens": num_tokens,
        "prompt_tokens": sum(len(job.prompt) for job in jobs),
        "longest_output": max(job.num_new for job in jobs),
        "engine_tokens_per_s": rate,
        "engine_seconds": summary(ours),
        "transformers": {str(size): numbers for size, numbers in theirs.items()},
        "transformers_best_batch": best,
        "ratio": rate["p50"] / theirs[best]["tokens_per_s"],
        "target_ratio": TARGET,
    }


def _share_of_peak(profile: dict[str, Any]) -> dict[str, Any]:
    """How long the run would take if it were matrix products alone, at the best rate of this machine."""
    floor = profile["matrix_products_flops"] / (profile["best_gflops_per_s"] * 1e9)
    return {"floor_s": floor, "share_of_floor": floor / profile["seconds"]}


def _headline(numbers: dict[str, Any], settings: GenerateBench) -> tuple[Headline, ...]:
    best = numbers["transformers_best_batch"]
    peer = numbers["transformers"][str(best)]["tokens_per_s"]
    return (
        Headline(
            what=f"output tokens/s, {settings.prompts} prompts x {settings.samples} samples, "
            f"{numbers['parameters'] / 1e6:.0f}M parameters, {settings.dtype}",
            measured=f"{numbers['engine_tokens_per_s']['p50']:,.0f}/s",
            target=f"at least {TARGET:g} x the usual way",
            met=numbers["ratio"] >= TARGET,
            peer=f"{peer:,.0f}/s (transformers' generate at its best batch size, {best}; {numbers['ratio']:.1f} x)",
        ),
    )


def _table(profile: dict[str, Any]) -> Table:
    """Where the time goes."""
    rows: list[tuple[str, ...]] = [
        (
            name,
            f"{phase['seconds']:.2f}",
            f"{phase['share']:.1%}",
            f"{phase['seconds'] / profile['steps'] * 1e3:.2f}",
            f"{phase['calls']:,}",
        )
        for name, phase in profile["phases"].items()
    ]
    title = f"{profile['seconds']:.1f} s of the engine, {profile['steps']:,} steps"
    return title, ("phase", "s", "share", "ms per step", "calls"), rows
