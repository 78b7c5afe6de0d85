"""`rollout bench pool`: what one update over many replicas costs besides moving the bytes."""

from __future__ import annotations

import time
from typing import Any

from rollout import Engine, RolloutPool
from weight_sync import SyncReport, WeightPublisher

from .results import BenchResult, Headline, Table, summary
from .screen import Screen
from .settings import PoolBench
from .shapes import DTYPES, model_folder, move_a_little, num_bytes, trainer_tensors

_CONTEXT = 256


def run_pool(settings: PoolBench, screen: Screen) -> BenchResult:
    """Publish to one engine and to a pool, in turns, from the same tensors."""
    screen.say(f"starting one engine, and a pool of {settings.num_replicas}")
    tensors = trainer_tensors(settings.model, DTYPES[settings.dtype])
    options: dict[str, Any] = {
        "load_format": "dummy",
        "await_first_update": False,
        "skip_tokenizer_init": True,
        "kv_cache_bytes": 64 << 20,
        "num_threads": 1,
    }
    times: dict[str, list[float]] = {"engine": [], "pool": []}
    reports: list[SyncReport] = []
    with (
        model_folder(settings.model, settings.dtype, _CONTEXT) as folder,
        Engine(folder, executor="local", **options) as engine,
        RolloutPool(folder, num_replicas=settings.num_replicas, **options) as pool,
        WeightPublisher(engine) as to_engine,
        WeightPublisher(pool) as to_pool,
    ):
        for step in range(settings.warmup + settings.repetitions):
            move_a_little(tensors)
            for name, publisher in (("engine", to_engine), ("pool", to_pool)):
                start = time.perf_counter()
                report = publisher.publish(tensors)
                if step >= settings.warmup:
                    times[name].append(time.perf_counter() - start)
                    if name == "pool":
                        reports.append(report)
        fingerprint = pool.weights_fingerprint()
        if fingerprint != engine.weights_fingerprint():
            raise AssertionError("engine and pool were sent the same tensors and hold others")
    numbers = _numbers(times, reports, num_bytes(tensors))
    return BenchResult(
        benchmark="pool",
        config={"settings": settings},
        numbers=numbers,
        headline=_headline(settings, numbers),
        tables=(_table(settings, numbers),),
    )


def _numbers(
    times: dict[str, list[float]], reports: list[SyncReport], bytes_: int
) -> dict[str, Any]:
    return {
        "model_bytes": bytes_,
        "engine_publish_s": summary(times["engine"]),
        "pool_publish_s": summary(times["pool"]),
        "pool_begin_to_verified_s": summary([r.begin_to_verified_s for r in reports]),
        "pool_pack_s": summary([report.pack_s for report in reports]),
        "pool_pause_s": summary([report.pause_s for report in reports]),
    }


def _headline(settings: PoolBench, numbers: dict[str, Any]) -> tuple[Headline, ...]:
    pool, engine = numbers["pool_publish_s"]["p50"], numbers["engine_publish_s"]["p50"]
    return (
        Headline(
            what=f"one update over {settings.num_replicas} replicas of {numbers['model_bytes'] / 1e6:.1f} MB",
            measured=f"{1e3 * pool:.1f} ms",
            floor=f"{1e3 * engine:.1f} ms (one engine)",
            ratio=f"{pool / engine:.1f}",
        ),
    )


def _table(settings: PoolBench, numbers: dict[str, Any]) -> Table:
    rows = [
        (
            name.removesuffix("_s").replace("_", " "),
            *(f"{1e3 * series[key]:.2f}" for key in ("p10", "p50", "p90", "max")),
        )
        for name, series in numbers.items()
        if name != "model_bytes"
    ]
    return (
        f"milliseconds, {settings.repetitions} updates",
        ("", "p10", "p50", "p90", "max"),
        rows,
    )
