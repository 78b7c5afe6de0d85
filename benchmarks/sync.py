"""`rollout bench sync`: what an update of another process costs, next to a plain copy and to the usual way."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch

import weight_sync
from rollout import Engine
from weight_sync import WeightPublisher

from .floor import PlainCopy, UsualWay
from .idle_host import served
from .parts import rounds, timed_update
from .results import BenchResult, Headline, Table, summary
from .screen import Screen
from .settings import ModelShape, MoeShape, SyncBench
from .shapes import DTYPES, model_folder, move_a_little, num_bytes, trainer_tensors
from .small_host import tensor_name

Series = defaultdict[str, list[float]]

TARGETS_X = {"pack": 3.0, "begin_to_committed": 3.0, "begin_to_verified": 6.0}
"""Most that a part may take, in plain copies of the same bytes."""
TARGET_US = 10.0
"""Most that a whole update of small tensors may take, microseconds per tensor."""
_CONTEXT = 512


def run_sync(settings: SyncBench, screen: Screen) -> BenchResult:
    """The models one after the other."""
    large, about = _engine(settings, settings.model, screen)
    small = _small(settings, screen)
    numbers: dict[str, Any] = {
        "large": {**about, **_numbers(large)},
        "small": {"num_tensors": settings.num_small, **_numbers(small)},
        "targets_in_plain_copies": TARGETS_X,
        "target_us_per_tensor": TARGET_US,
    }
    series = {"small": small}
    if settings.experts.num_layers:
        experts, about = _engine(settings, settings.experts, screen)
        numbers["experts"] = {**about, **_numbers(experts)}
        series["experts"] = experts
    for name, found in series.items():
        num_tensors = numbers[name]["num_tensors"]
        per_tensor = [seconds * 1e6 / num_tensors for seconds in found["publish"]]
        numbers[name]["us_per_tensor"] = summary(per_tensor)
    return BenchResult(
        benchmark="sync",
        config={"settings": settings, "num_threads": torch.get_num_threads()},
        numbers=numbers,
        headline=tuple(_headline(numbers, settings)),
        tables=tuple(
            _table(title, numbers[name])
            for name, title in (
                ("large", "the large model"),
                ("small", "small"),
                ("experts", "experts"),
            )
            if name in numbers
        ),
        has_picture=True,
    )


def _engine(
    settings: SyncBench, model: ModelShape | MoeShape, screen: Screen
) -> tuple[Series, dict[str, Any]]:
    """The engine in a process of its own."""
    screen.say("making the model, and an engine for it in another process")
    tensors = trainer_tensors(model, DTYPES[settings.dtype])
    with (
        model_folder(model, settings.dtype, _CONTEXT) as folder,
        Engine(
            folder,
            executor="local",
            load_format="dummy",
            await_first_update=False,
            skip_tokenizer_init=True,
            kv_cache_bytes=64 << 20,
        ) as engine,
        WeightPublisher(engine) as publisher,
    ):
        series = _rounds(settings, screen, f"{len(tensors)} tensors", tensors, publisher)
        assert engine.weights_fingerprint() == weight_sync.fingerprint(tensors)
    return series, {"num_tensors": len(tensors), "num_bytes": num_bytes(tensors)}


def _small(settings: SyncBench, screen: Screen) -> Series:
    """Many small tensors, received by a process that is no engine."""
    size = settings.small_size
    tensors = {
        tensor_name(i): torch.full((size, size), float(i % 251), dtype=torch.bfloat16)
        for i in range(settings.num_small)
    }
    with (
        served("small_host", settings.num_small, size) as address,
        WeightPublisher(address) as publisher,
    ):
        title = f"{settings.num_small:,} tensors of {size} x {size}"
        series = _rounds(settings, screen, title, tensors, publisher)
        assert publisher.fingerprint() == weight_sync.fingerprint(tensors)
    return series


def _rounds(
    settings: SyncBench,
    screen: Screen,
    title: str,
    tensors: dict[str, torch.Tensor],
    publisher: WeightPublisher,
) -> Series:
    """Plain copy, update, plain copy, usual way, and again: what is compared is measured side by side."""
    copy = PlainCopy(num_bytes(tensors))
    usual = UsualWay(tensors, copy.target)
    series: Series = defaultdict(list)
    for advance in rounds(settings, screen, title, series):
        move_a_little(tensors)
        before = copy.run()
        took = timed_update(publisher, tensors)
        took["plain_copy"] = (before + copy.run()) / 2
        took["usual_cat"], took["usual_copy_out"] = usual.run()
        took["usual"] = took["usual_cat"] + took["usual_copy_out"]
        for name, seconds in took.items():
            series[name].append(seconds)
        copies = took["publish"] / took["plain_copy"]
        advance(f"{took['publish'] * 1e3:.1f} ms, {copies:.2f} copies")
    return series


def _numbers(series: Series) -> dict[str, Any]:
    """Seconds, and multiples of the plain copies of the same round."""
    floor = series["plain_copy"]
    return {
        "seconds": {name: summary(values) for name, values in series.items()},
        "plain_copies": {
            name: summary([value / copy for value, copy in zip(values, floor, strict=True)])
            for name, values in series.items()
        },
    }


def _headline(numbers: dict[str, Any], settings: SyncBench) -> Iterator[Headline]:
    large = numbers["large"]
    seconds, copies = large["seconds"], large["plain_copies"]
    floor = f"{seconds['plain_copy']['p50'] * 1e3:.1f} ms (one copy)"
    size = f"{large['num_bytes'] / 1e9:.2f} GB, {large['num_tensors']} tensors"
    usual = f"{seconds['usual']['p50'] * 1e3:.1f} ms (concatenate, copy out, no check)"
    for name, words in (
        ("pack", "pack"),
        ("begin_to_committed", "begin to committed"),
        ("begin_to_verified", "begin to verified"),
        ("publish", "the whole call"),
    ):
        limit = TARGETS_X.get(name)
        yield Headline(
            what=f"update of {size}: {words}",
            measured=f"{seconds[name]['p50'] * 1e3:.1f} ms",
            floor=floor,
            ratio=f"{copies[name]['p50']:.2f}",
            target="" if limit is None else f"at most {limit:g} x the floor",
            met=None if limit is None else copies[name]["p50"] <= limit,
            peer=usual if name == "publish" else "",
        )
    side = settings.small_size
    for name, words in (
        ("small", f"tensors of {side} x {side}"),
        ("experts", "tensors of experts"),
    ):
        if name not in numbers:
            continue
        found = numbers[name]
        num_tensors, each_us = found["num_tensors"], found["us_per_tensor"]["p50"]
        usual_us = found["seconds"]["usual"]["p50"] * 1e6 / num_tensors
        yield Headline(
            what=f"update of {num_tensors:,} {words}, per tensor",
            measured=f"{each_us:.2f} us",
            target=f"at most {TARGET_US:g} us",
            met=each_us <= TARGET_US,
            peer=f"{usual_us:.2f} us (concatenate, copy out, no check)",
        )


def _table(title: str, numbers: dict[str, Any]) -> Table:
    """Every series of one model."""
    rows: list[tuple[str, ...]] = [
        (
            name.replace("_", " "),
            *(f"{values[key] * 1e3:.1f}" for key in ("min", "p10", "p50", "p90")),
            f"{numbers['plain_copies'][name]['p50']:.2f}",
        )
        for name, values in numbers["seconds"].items()
    ]
    return f"{title}, ms", ("", "min", "p10", "p50", "p90", "plain copies, p50"), rows
