"""`rollout bench gpu`: what an update costs when trainer and engine have a GPU each, next to a copy between them."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch

import weight_sync
from rollout import Engine
from rollout.errors import ConfigError
from weight_sync import WeightPublisher

from .parts import rounds, timed_update
from .results import BenchResult, Headline, Table, summary
from .screen import Screen
from .settings import GpuBench
from .shapes import DTYPES, model_folder, move_a_little, num_bytes, trainer_tensors

WAYS: dict[str, dict[str, Any]] = {
    "peer_reads": {"transport": "cuda_ipc"},
    "two_buckets": {"transport": "cuda_ipc"},
    "nccl": {"transport": "process_group", "group_backend": "nccl"},
    "shared_memory": {"transport": "shared_memory"},
    "gloo": {"transport": "process_group", "group_backend": "gloo"},
}
"""How the bytes go: read by the engine's GPUs out of the trainer's, from as much as the model or from two buckets of it
in turn; over NCCL; through the memory that both processes share; through sockets."""
_BUCKET_BYTES = 256 << 20
_CONTEXT = 512
PEER_RATIO = 1.3
"""Begin to verified by peer reads, in copies from GPU to GPU."""

Series = dict[str, list[float]]


def run_gpu(settings: GpuBench, screen: Screen) -> BenchResult:
    """Every way once in each round. The engine's ranks have the first GPUs, the trainer the next one, or the last one
    of them where there are no more."""
    check_machine(settings)
    trainer_gpu = torch.device("cuda", min(settings.tp_size, torch.cuda.device_count() - 1))
    screen.say(f"making the model on {trainer_gpu}, and an engine for it in another process")
    dtype = DTYPES[settings.dtype]
    tensors = trainer_tensors(settings.model, dtype, device=str(trainer_gpu))
    series: dict[str, Series] = {}
    with (
        ExitStack() as stack,
        model_folder(settings.model, settings.dtype, _CONTEXT) as folder,
        torch.cuda.device(trainer_gpu),
        Engine(
            folder,
            executor="local",
            device="cuda",
            tp_size=settings.tp_size,
            load_format="dummy",
            await_first_update=False,
            skip_tokenizer_init=True,
            kv_cache_bytes=64 << 20,
        ) as engine,
    ):
        publishers = {
            way: stack.enter_context(WeightPublisher(engine, **_options(way, tensors)))
            for way in settings.ways
        }
        # What has to leave the trainer's GPU; a rank that shares that GPU has its part there.
        others = settings.tp_size - (trainer_gpu.index < settings.tp_size)
        crossing = num_bytes(tensors) * others // settings.tp_size
        floor = GpuCopy(crossing, trainer_gpu, torch.device("cuda", 0))
        for advance in rounds(settings, screen, f"{len(tensors)} tensors", series):
            round_ = {"copy": {"publish": floor.run()}}
            for way, publisher in publishers.items():
                move_a_little(tensors)
                round_[way] = timed_update(publisher, tensors)
            for way, values in round_.items():
                kept = series.setdefault(way, defaultdict(list))
                for name, seconds in values.items():
                    kept[name].append(seconds)
            advance(", ".join(f"{w} {v['publish'] * 1e3:.1f} ms" for w, v in round_.items()))
        if engine.weights_fingerprint() != weight_sync.fingerprint(tensors):
            raise AssertionError("the engine was sent these tensors and holds others")
        stack.close()  # Before the engine ends.
    return _result(settings, series, len(tensors), num_bytes(tensors))


def check_machine(settings: GpuBench) -> None:
    """`ConfigError` where there are too few GPUs, or a way that nobody knows."""
    unknown = sorted(set(settings.ways) - set(WAYS))
    if unknown or not settings.ways:
        raise ConfigError(f"gpu.ways: got {unknown or 'none'}, expected some of {sorted(WAYS)}")
    alone = settings.tp_size == 1 or "nccl" in settings.ways
    needed, found = settings.tp_size + alone, torch.cuda.device_count()
    if found < needed:
        raise ConfigError(
            f"rollout bench gpu: got {found} GPUs, expected {needed}, one for each rank of the engine and, with one "
            "rank or NCCL, one for the trainer; use `rollout bench sync` and `rollout bench group` on a CPU"
        )


def _options(way: str, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Of the publisher."""
    if way != "two_buckets":
        return WAYS[way]
    largest = max(tensor.nbytes for tensor in tensors.values())
    return WAYS[way] | {"arena_bytes": 2 * max(_BUCKET_BYTES, largest)}


class GpuCopy:
    """A copy of the same bytes from GPU to GPU: what NCCL cannot be faster than."""

    def __init__(self, num_bytes: int, source: torch.device, target: torch.device) -> None:
        self.source = torch.ones(num_bytes, dtype=torch.uint8, device=source)
        self.target = torch.zeros(num_bytes, dtype=torch.uint8, device=target)

    def run(self) -> float:
        """Seconds of one copy."""
        self._wait()
        start = time.perf_counter()
        self.target.copy_(self.source)
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        for tensor in (self.source, self.target):
            torch.cuda.synchronize(tensor.device)


def _result(
    settings: GpuBench, series: dict[str, Series], num_tensors: int, size: int
) -> BenchResult:
    numbers: dict[str, Any] = {
        way: {name: summary(values) for name, values in parts.items()}
        for way, parts in series.items()
    }
    floor = numbers["copy"]["publish"]["p50"]
    return BenchResult(
        benchmark="gpu",
        config={"settings": settings, "num_threads": torch.get_num_threads()},
        numbers={"num_tensors": num_tensors, "num_bytes": size, "seconds": numbers},
        headline=tuple(_headline(settings, numbers, floor, num_tensors, size)),
        device=f"{min(settings.tp_size + 1, torch.cuda.device_count())} x {torch.cuda.get_device_name(0)}",
        tables=(_table(settings, numbers),),
        has_picture=True,
    )


def _headline(
    settings: GpuBench, numbers: dict[str, Any], floor: float, num_tensors: int, size: int
) -> Iterator[Headline]:
    ranks = "another GPU" if settings.tp_size == 1 else f"{settings.tp_size} ranks on GPUs"
    what = f"update of {size / 1e9:.2f} GB, {num_tensors} tensors, to {ranks}"
    for way in settings.ways:
        words = f"{what}: {way.replace('_', ' ')}"
        copy = f"{floor * 1e3:.1f} ms (one copy from GPU to GPU)"
        whole, verified = (numbers[way][part]["p50"] for part in ("publish", "begin_to_verified"))
        yield Headline(
            what=f"{words}, the whole call",
            measured=f"{whole * 1e3:.1f} ms",
            floor=copy,
            ratio=f"{whole / floor:.1f}",
        )
        if way == "peer_reads":
            yield Headline(
                what=f"{words}, begin to verified",
                measured=f"{verified * 1e3:.1f} ms",
                floor=copy,
                ratio=f"{verified / floor:.2f}",
                target=f"at most {PEER_RATIO}",
                met=verified / floor <= PEER_RATIO,
            )


def _table(settings: GpuBench, numbers: dict[str, Any]) -> Table:
    rows = [
        (
            part.replace("_", " "),
            *(f"{numbers[way][part]['p50'] * 1e3:.1f}" for way in settings.ways),
        )
        for part in numbers[settings.ways[0]]
    ]
    rows.append(
        ("a copy from GPU to GPU", f"{numbers['copy']['publish']['p50'] * 1e3:.1f}")
        + ("",) * (len(settings.ways) - 1)
    )
    return (
        f"milliseconds, median of {settings.repetitions} updates",
        ("", *(way.replace("_", " ") for way in settings.ways)),
        rows,
    )
