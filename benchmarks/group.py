"""`rollout bench group`: an update over a process group, next to what memory and loopback allow and to plain gloo."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch

import weight_sync
from rollout import Engine
from weight_sync import WeightPublisher

from .floor import PlainCopy
from .loopback import LoopbackPeer
from .parts import rounds, timed_update
from .results import BenchResult, Headline, Table, summary
from .screen import Screen
from .settings import GroupBench
from .shapes import DTYPES, model_folder, move_a_little, num_bytes, trainer_tensors

Series = defaultdict[str, list[float]]

TARGET_COPIES = 3.0
"""Most that an update may take in plain copies of the same bytes, where the loopback allows it."""
OURS = {
    "group_alone": "the broadcast alone",
    "wire": "wire and messages",
    "begin_to_committed": "begin to committed",
    "begin_to_verified": "begin to verified",
    "publish": "the whole call",
}
"""What is held against the bound."""
PEERS = {"each": "gloo, tensor by tensor", "flat": "gloo, one flat tensor"}
"""The usual ways: they check nothing."""
_CONTEXT = 512


def run_group(settings: GroupBench, screen: Screen) -> BenchResult:
    """One engine after the other; the other ways reach one process, and are measured beside the first engine."""
    load_before = os.getloadavg()
    screen.say("making the model, and a process that receives it in other ways")
    tensors = trainer_tensors(settings.model, DTYPES[settings.dtype])
    copy = PlainCopy(num_bytes(tensors))
    _fill(copy.source, tensors)
    engines: dict[str, Any] = {}
    with LoopbackPeer(tensors, copy.source, num_streams=max(settings.stream_counts)) as peer:
        screen.say("checking that every way delivers every byte")
        peer.prove(settings.stream_counts)
        for tp_size in settings.tp_sizes:
            others = tp_size == settings.tp_sizes[0]
            series = _engine(settings, screen, tp_size, tensors, copy, peer, others=others)
            engines[str(tp_size)] = _numbers(series, tp_size, settings)
    numbers = {
        "num_tensors": len(tensors),
        "num_bytes": num_bytes(tensors),
        "target_copies": TARGET_COPIES,
        "load_before": load_before,  # of others; the result's own `load` has this benchmark in it
        "engines": engines,
    }
    return BenchResult(
        benchmark="group",
        config={"settings": settings, "num_threads": torch.get_num_threads()},
        numbers=numbers,
        headline=tuple(_headline(numbers)),
        tables=tuple(_table(tp_size, engine) for tp_size, engine in engines.items()),
        has_picture=True,
    )


def _fill(memory: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
    """Write the tensors into `memory` (uint8), one after another."""
    parts = memory.split([tensor.nbytes for tensor in tensors.values()])
    for part, tensor in zip(parts, tensors.values(), strict=True):
        part.copy_(tensor.view(-1).view(torch.uint8))


def _engine(
    settings: GroupBench,
    screen: Screen,
    tp_size: int,
    tensors: dict[str, torch.Tensor],
    copy: PlainCopy,
    peer: LoopbackPeer,
    *,
    others: bool,
) -> Series:
    """Rounds with one engine in processes of its own."""
    screen.say(f"starting an engine of {tp_size} rank(s), and a group with it")
    with (
        model_folder(settings.model, settings.dtype, _CONTEXT) as folder,
        Engine(
            folder,
            executor="local",
            device="cpu",  # It is the loopback that is measured.
            tp_size=tp_size,
            load_format="dummy",
            await_first_update=False,
            skip_tokenizer_init=True,
            kv_cache_bytes=64 << 20,
        ) as engine,
        WeightPublisher(
            engine, transport="process_group", bucket_bytes=settings.bucket_mb << 20
        ) as publisher,
    ):
        title = f"{tp_size} rank(s)"
        series = _rounds(settings, screen, title, tensors, publisher, copy, peer, others=others)
        assert engine.weights_fingerprint() == weight_sync.fingerprint(tensors)
    return series


def _rounds(
    settings: GroupBench,
    screen: Screen,
    title: str,
    tensors: dict[str, torch.Tensor],
    publisher: WeightPublisher,
    copy: PlainCopy,
    peer: LoopbackPeer,
    *,
    others: bool,
) -> Series:
    """A copy, the update, a copy, sockets and `others`: what is compared is measured side by side."""
    series: Series = defaultdict(list)
    for advance in rounds(settings, screen, title, series):
        move_a_little(tensors)
        before = copy.run()
        took = timed_update(publisher, tensors)
        took["plain_copy"] = (before + copy.run()) / 2
        # What neither checks nor copies: the bytes under way, messages, the wait for a step boundary.
        took["wire"] = took["begin_to_committed"] - took["check_staged"] - took["copy"]
        took |= {f"sockets_{num}": peer.sockets(num) for num in settings.stream_counts}
        if others:
            took["group_alone"] = peer.group()
            took["each"] = peer.tensor_by_tensor()
            took["flat"] = peer.flat()
        for name, seconds in took.items():
            series[name].append(seconds)
        verified, floor = took["begin_to_verified"], min(_loopback(series, settings, -1))
        advance(f"verified in {verified * 1e3:.0f} ms, loopback {floor * 1e3:.0f} ms")
    return series


def _loopback(series: Series, settings: GroupBench, i: int) -> list[float]:
    """Round `i`'s seconds for each number of sockets."""
    return [series[f"sockets_{num}"][i] for num in settings.stream_counts]


def _numbers(series: Series, tp_size: int, settings: GroupBench) -> dict[str, Any]:
    """Seconds; and multiples of the same round's plain copy, and of its bound."""
    medians = {num: summary(series[f"sockets_{num}"])["p50"] for num in settings.stream_counts}
    best = min(medians, key=lambda num: medians[num])
    # Every rank is sent all bytes, over a connection of its own.
    series["loopback"] = [seconds * tp_size for seconds in series[f"sockets_{best}"]]
    pairs = zip(series["plain_copy"], series["loopback"], strict=True)
    bound = [max(TARGET_COPIES * copy, loopback) for copy, loopback in pairs]
    series["bound"] = bound
    of_bound = {name: _ratios(values, bound) for name, values in series.items()}
    return {
        "best_streams": best,
        "loopback_is_the_bound": sum(bound) > TARGET_COPIES * sum(series["plain_copy"]),
        "seconds": {name: summary(values) for name, values in series.items()},
        "plain_copies": {
            name: _ratios(values, series["plain_copy"]) for name, values in series.items()
        },
        "of_bound": of_bound,
        "met": {name: of_bound[name]["p50"] <= 1 for name in OURS if name in series},
    }


def _ratios(values: list[float], others: list[float]) -> dict[str, float]:
    return summary([value / other for value, other in zip(values, others, strict=True)])


def _headline(numbers: dict[str, Any]) -> Iterator[Headline]:
    size = f"{numbers['num_bytes'] / 1e9:.2f} GB"
    for tp_size, engine in numbers["engines"].items():
        seconds, of_bound = engine["seconds"], engine["of_bound"]
        bound = f"{seconds['bound']['p50'] * 1e3:.0f} ms ({_bound_name(engine)})"
        names = ["group_alone", "begin_to_committed", "begin_to_verified"]
        peers = {words: seconds[name]["p50"] for name, words in PEERS.items() if name in seconds}
        best = min(peers, key=lambda words: peers[words], default=None)
        to_ranks = "" if tp_size == "1" else f" to {tp_size} ranks"
        for name in filter(seconds.__contains__, names):
            promised, last = tp_size == "1", name == names[-1]
            yield Headline(
                what=f"update of {size} over gloo on loopback{to_ranks}: {OURS[name]}",
                measured=f"{seconds[name]['p50'] * 1e3:.0f} ms",
                floor=bound,
                ratio=f"{of_bound[name]['p50']:.2f}",
                target="at most 1 x the floor" if promised else "",
                met=engine["met"][name] if promised else None,
                peer=f"{peers[best] * 1e3:.0f} ms ({best}, unchecked)" if last and best else "",
            )


def _bound_name(engine: dict[str, Any]) -> str:
    if engine["loopback_is_the_bound"]:
        streams = engine["best_streams"]
        return f"{streams} plain socket{'s' if streams > 1 else ''}"
    return f"{TARGET_COPIES:g} copies"


def _table(tp_size: str, engine: dict[str, Any]) -> Table:
    """Every series of one engine."""
    rows: list[tuple[str, ...]] = []
    for name, values in engine["seconds"].items():
        rows.append(
            (
                (OURS | PEERS).get(name, name.replace("_", " ")),
                *(f"{values[key] * 1e3:.1f}" for key in ("min", "p50", "p90")),
                f"{engine['plain_copies'][name]['p50']:.2f}",
                f"{engine['of_bound'][name]['p50']:.2f}",
            )
        )
    columns = ("", "min", "p50", "p90", "copies", "of bound")
    return f"{tp_size} rank(s), ms; bound: {_bound_name(engine)}", columns, rows
