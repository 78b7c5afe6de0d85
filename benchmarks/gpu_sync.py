"""`rollout bench gpu sync`: what an update costs when trainer and engine are two processes on one GPU.

Floors are measured in the same run: one copy of the bytes, and one pass that reads them, at the rates of this GPU.
"""

from __future__ import annotations

import gc
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

import weight_sync
from rollout import Engine
from rollout.errors import ConfigError
from weight_sync import WeightPublisher

from .expert_engine import dense_shapes, expert_shapes
from .idle_host import served
from .parts import timed_update
from .pause import streaming
from .results import BenchResult, Headline, Table, summary
from .screen import Screen
from .settings import GpuSyncBench, ModelShape, PauseBench
from .shapes import DTYPES, model_folder, move_a_little, num_bytes, trainer_tensors

_CONTEXT = 512
_FLOOR_BYTES = 2 << 30
Series = dict[str, list[float]]
Line = tuple[str, dict[str, float], float | None]
"""What was measured, its summary and its floor in seconds; None: not known."""


def run_gpu_sync(settings: GpuSyncBench, screen: Screen) -> BenchResult:
    """Every model in turn, each with an engine of its own; then experts; then memory that comes and goes."""
    check_settings(settings)
    rates = measure_rates()
    numbers: dict[str, Any] = {"rates": rates, "models": {}}
    for name, shape in settings.models.items():
        screen.say(f"{name}: making the trainer's model, and an engine in another process")
        found = numbers["models"][name] = _one_model(settings, name, shape, rates, screen)
        for words, value, floor in _lines(found):
            beside = "" if floor is None else f", floor {_ms(floor)} ms"
            screen.say(f"{name}: {words}: {_ms(value['p50'])} ms{beside}")
        _let_go()
    if settings.num_experts and settings.only in ("", "experts"):
        screen.say("experts, and the same bytes dense")
        numbers["experts"] = _experts(settings)
        _let_go()
    return _result(settings, numbers)


def check_settings(settings: GpuSyncBench) -> None:
    """`ConfigError` for a part that nobody knows, and where there is no GPU."""
    parts = ("", "small", "large", "experts")
    if settings.only not in parts:
        raise ConfigError(f"gpu_sync.only: got {settings.only!r}, expected one of {parts}")
    if not torch.cuda.is_available():
        raise ConfigError(
            "rollout bench gpu sync: got no GPU, expected one, which trainer and engine share; use "
            "`rollout bench sync` on a CPU"
        )


def measure_rates() -> dict[str, float]:
    """Bytes a second of a copy (payload), of a read, and of a copy from pinned memory of the host."""
    source = torch.randint(0, 255, (_FLOOR_BYTES,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    words = source.view(torch.int64)
    pinned = torch.empty(_FLOOR_BYTES // 2, dtype=torch.uint8, pin_memory=True)
    return {
        "copy": _FLOOR_BYTES / _timed(lambda: target.copy_(source)),
        "read": _FLOOR_BYTES / _timed(lambda: words.sum()),
        "upload": len(pinned)
        / _timed(lambda: target[: len(pinned)].copy_(pinned, non_blocking=True)),
    }


def _timed(action: Callable[[], object], rounds: int = 8) -> float:
    """Median seconds on the GPU."""
    seconds = []
    for _ in range(rounds + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        action()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    return summary(seconds[2:])["p50"]


def _one_model(
    settings: GpuSyncBench, name: str, shape: ModelShape, rates: dict[str, float], screen: Screen
) -> dict[str, Any]:
    """Series after series, as long as there is time; each is said when it is there."""
    began = time.perf_counter()
    tensors = trainer_tensors(shape, DTYPES[settings.dtype], device="cuda")
    num_tensors, size = len(tensors), num_bytes(tensors)
    series: dict[str, Series] = {}

    def measure(what: str, run: Callable[[], Series]) -> None:
        start = time.perf_counter()
        if series and settings.budget_s and start - began > settings.budget_s:
            screen.say(f"{name}: no time is left for {what}")
            return
        series[what] = run()
        now = time.perf_counter()
        screen.say(f"{name}: {what} took {now - start:.0f} s, ended after {now - began:.0f}")

    with (
        model_folder(shape, settings.dtype, _CONTEXT) as folder,
        _engine(settings, folder) as engine,
    ):
        screen.say(f"{name}: the engine was ready after {time.perf_counter() - began:.0f} s")
        with WeightPublisher(engine, transport="cuda_ipc") as publisher:
            counts = {"warmup": settings.warmup, "repetitions": settings.repetitions}
            measure("idle", lambda: _rounds(publisher, tensors, **counts))
            for verify in ("pause", "overlapped"):
                watched = partial(_streaming, settings, shape, engine, publisher, tensors, verify)
                measure(f"streaming, {verify}", watched)
            if engine.weights_fingerprint() != weight_sync.fingerprint(tensors):
                raise AssertionError("the engine was sent these tensors and holds others")
        measure("release and resume", lambda: _memory(engine, tensors))
        measure("from the CPU", lambda: _from_cpu(settings, engine, tensors))
    return {
        "num_tensors": num_tensors,
        "num_bytes": size,
        "floors_s": {
            "copy": size / rates["copy"],
            "read": size / rates["read"],
            "upload": size / rates["upload"],
        },
        "seconds": {
            name: {part: summary(values) for part, values in parts.items()}
            for name, parts in series.items()
        },
    }


def _engine(settings: GpuSyncBench, folder: Path) -> Engine:
    return Engine(
        folder,
        executor="local",
        device="cuda",
        load_format="dummy",
        skip_tokenizer_init=True,
        kv_cache_bytes=settings.kv_cache_mb << 20,
    )


def _streaming(
    settings: GpuSyncBench,
    shape: ModelShape,
    engine: Engine,
    publisher: WeightPublisher,
    tensors: dict[str, torch.Tensor],
    verify: Any,
) -> Series:
    """What a client sees of updates."""
    pause = PauseBench(model=shape, dtype=settings.dtype, batch_size=settings.batch_size)
    found: Series = defaultdict(list)
    with streaming(engine, pause) as arrivals:
        while arrivals.num_tokens < 4 * settings.batch_size and arrivals.failure is None:
            time.sleep(0.01)
        for _ in range(settings.repetitions):
            time.sleep(settings.quiet_s)
            start = time.perf_counter()
            report = publisher.publish(tensors, verify=verify)
            end = time.perf_counter()
            time.sleep(0.2)
            found["gap"].append(arrivals.worst(start, end + 0.1))
            found["quiet_gap"].append(arrivals.worst(start - 0.3, start))
            found["engine_pause"].append(report.pause_s)
        found["step"] = [length for _, length in arrivals.gaps(0.0, time.perf_counter())]
    return found


def _rounds(
    publisher: WeightPublisher, tensors: dict[str, torch.Tensor], *, warmup: int, repetitions: int
) -> Series:
    series: Series = defaultdict(list)
    for i in range(warmup + repetitions):
        move_a_little(tensors)
        seconds = timed_update(publisher, tensors)
        seconds["publish_beyond_packing"] = seconds["publish"] - seconds["pack"]
        if i >= warmup:
            for name, value in seconds.items():
                series[name].append(value)
    return series


def _from_cpu(settings: GpuSyncBench, engine: Engine, tensors: dict[str, torch.Tensor]) -> Series:
    """Each round packs on the CPU, which takes seconds. The tensors leave the GPU."""
    on_cpu = {name: tensors.pop(name).cpu() for name in list(tensors)}
    _let_go()
    with WeightPublisher(engine, transport="shared_memory") as publisher:
        return _rounds(publisher, on_cpu, warmup=1, repetitions=settings.cpu_repetitions)


def _memory(engine: Engine, tensors: dict[str, torch.Tensor]) -> Series:
    """Give all memory back and take it again; without keeping the weights they are pushed anew."""
    series: Series = defaultdict(list)
    for i in range(3 + 1):
        for words, keep in (("kept", True), ("lost", False)):
            start = time.perf_counter()
            engine.release_memory_occupation(keep_weights=keep)
            released = time.perf_counter()
            engine.resume_memory_occupation()
            if i:
                series[f"release, weights {words}"].append(released - start)
                series[f"resume, weights {words}"].append(time.perf_counter() - released)
    with WeightPublisher(engine, transport="cuda_ipc") as publisher:
        publisher.publish(tensors)
    return series


def _experts(settings: GpuSyncBench) -> dict[str, Any]:
    sizes = (
        settings.expert_layers,
        settings.num_experts,
        settings.expert_width,
        settings.expert_inner,
    )
    numbers: dict[str, Any] = {}
    for kind, shapes in (("dense", dense_shapes), ("experts", expert_shapes)):
        tensors = {
            name: torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_(0, 0.02)
            for name, shape in shapes(*sizes).items()
        }
        with (
            served("expert_engine", kind, *sizes) as address,
            WeightPublisher(address, transport="cuda_ipc") as publisher,
        ):
            series = _rounds(
                publisher,
                tensors,
                warmup=settings.warmup,
                repetitions=settings.repetitions,
            )
            for _ in range(3):
                start = time.perf_counter()
                found = weight_sync.fingerprint(tensors)
                series["fingerprint(tensors)"].append(time.perf_counter() - start)
            if publisher.fingerprint() != found:
                raise AssertionError("the engine was sent these tensors and holds others")
        numbers[kind] = {name: summary(values) for name, values in series.items()}
        numbers[kind] |= {"num_tensors": len(tensors), "num_bytes": num_bytes(tensors)}
        del tensors
        _let_go()
    return numbers


def _let_go() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.1f}"


def _headline(numbers: dict[str, Any]) -> Iterator[Headline]:
    for found in numbers["models"].values():
        whole, floors = found["seconds"]["idle"]["publish"]["p50"], found["floors_s"]
        floor = 2 * floors["copy"] + floors["read"]
        yield Headline(
            what=f"update of {found['num_bytes'] / 1e9:.1f} GB, {found['num_tensors']} tensors, on one GPU, verified, "
            "the whole call",
            measured=f"{_ms(whole)} ms",
            floor=f"{_ms(floor)} ms (two copies, one read)",
            ratio=f"{whole / floor:.2f}",
        )
    if "experts" in numbers:
        dense, experts = numbers["experts"]["dense"], numbers["experts"]["experts"]
        whole, floor = experts["publish"]["p50"], dense["publish"]["p50"]
        yield Headline(
            what=f"update of {experts['num_tensors']} expert tensors into stacked parameters, the whole call",
            measured=f"{_ms(whole)} ms",
            floor=f"{_ms(floor)} ms (the same bytes, dense)",
            ratio=f"{whole / floor:.2f}",
            target="at most 1.5 times the floor and 10 ms",
            met=whole <= experts_limit(floor),
        )


def experts_limit(dense: float) -> float:
    """Seconds that an update of experts may take whose bytes take `dense` in dense tensors."""
    return 1.5 * dense + 0.01


def update_lines(found: dict[str, Any]) -> Iterator[Line]:
    """What was measured of one model's updates on the GPU. A commit is one copy: what is written is read back in it."""
    seconds, floors = found["seconds"], found["floors_s"]
    copy, read = floors["copy"], floors["read"]
    step = seconds.get("streaming, pause", {}).get("step", {"p50": 0.0})["p50"]
    for words, name, part, floor in (
        ("pack, with fingerprints", "idle", "pack", copy),
        ("check of the staged bytes", "idle", "check_staged", read),
        ("begin to committed, copies queued", "idle", "begin_to_committed", None),
        ("begin to verified", "idle", "begin_to_verified", copy + read),
        ("engine's pause, verified in it", "idle", "pause", copy),
        ("the whole call", "idle", "publish", 2 * copy + read),
        ("a client's longest wait for a token", "streaming, pause", "gap", step + copy),
        ("the same, verified behind it", "streaming, overlapped", "gap", step + copy),
    ):
        if name in seconds:
            yield words, seconds[name][part], floor


def host_lines(found: dict[str, Any]) -> Iterator[Line]:
    """What was measured of one model and passes through the host, or leaves the GPU."""
    seconds, upload = found["seconds"], found["floors_s"]["upload"]
    if "from the CPU" in seconds:
        yield "from the CPU: pack", seconds["from the CPU"]["pack"], None
        beyond = seconds["from the CPU"]["publish_beyond_packing"]
        yield "from the CPU: the rest", beyond, upload
    for what, value in seconds.get("release and resume", {}).items():
        yield what, value, upload if "kept" in what else None


def _lines(found: dict[str, Any]) -> Iterator[Line]:
    yield from update_lines(found)
    yield from host_lines(found)


def _result(settings: GpuSyncBench, numbers: dict[str, Any]) -> BenchResult:
    rows: list[tuple[str, ...]] = []
    for name, found in numbers["models"].items():
        for what, value, floor in _lines(found):
            rows.append((name, what, _ms(value["p50"]), _ms(value["p90"]), _ms(floor)))
    if "experts" in numbers:
        dense, experts = numbers["experts"]["dense"], numbers["experts"]["experts"]
        for name, kind in (("dense", dense), ("experts", experts)):
            for what in ("publish", "begin_to_verified", "pack", "fingerprint(tensors)"):
                words = f"{kind['num_tensors']} tensors, {what.replace('_', ' ')}"
                rows.append((name, words, _ms(kind[what]["p50"]), _ms(kind[what]["p90"]), ""))
    table: Table = (
        f"milliseconds, {settings.repetitions} rounds each",
        ("", "what", "p50", "p90", "floor"),
        rows,
    )
    return BenchResult(
        benchmark="gpu-sync",
        config={"settings": settings, "num_threads": torch.get_num_threads()},
        numbers=numbers,
        headline=tuple(_headline(numbers)),
        device=torch.cuda.get_device_name(0),
        tables=(table,),
        has_picture=True,
    )
