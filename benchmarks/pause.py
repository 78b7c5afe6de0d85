"""`rollout bench pause`: how long a streaming client waits for its next token because weights are being updated."""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from rollout import Engine
from weight_sync import SyncReport, WeightPublisher

from .floor import PlainCopy
from .results import BenchResult, Headline, Table, summary
from .screen import Screen
from .settings import PauseBench
from .shapes import DTYPES, model_folder, move_a_little, num_bytes, trainer_tensors

_CONTEXT = 4096
_LEAST_TOKENS = 16
"""Tokens of each request before the first update."""
_COPIES = 9


@dataclass(slots=True)
class Arrivals:
    """When each token of a stream reached the client, `time.perf_counter()`; one list per request."""

    times: list[list[float]]
    failure: BaseException | None = None
    stopped: threading.Event = field(default_factory=threading.Event)

    def gaps(self, start: float, end: float) -> list[tuple[float, float]]:
        """(end of the gap, its length) of all gaps between two tokens that touch [start, end], all requests."""
        found = []
        for times in self.times:
            for before, after in itertools.pairwise(times):
                if after >= start and before <= end:
                    found.append((after, after - before))
        return found

    def worst(self, start: float, end: float) -> float:
        """The longest of them."""
        return max(length for _, length in self.gaps(start, end))

    @property
    def num_tokens(self) -> int:
        """Of the request that has the fewest."""
        return min(map(len, self.times))


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """One update under the stream."""

    start: float
    end: float
    report: SyncReport


def run_pause(settings: PauseBench, screen: Screen) -> BenchResult:
    """Stream from an engine in another process; update it now and then; look at the gaps between tokens."""
    screen.say("making the model, and an engine for it in another process")
    tensors = trainer_tensors(settings.model, DTYPES[settings.dtype])
    copy = PlainCopy(num_bytes(tensors))
    copies = [copy.run() for _ in range(_COPIES)][1:]
    with (
        model_folder(settings.model, settings.dtype, _CONTEXT) as folder,
        Engine(
            folder,
            executor="local",
            load_format="dummy",
            await_first_update=False,
            skip_tokenizer_init=True,
            kv_cache_bytes=_kv_bytes(settings),
        ) as engine,
        WeightPublisher(engine) as publisher,
    ):
        publisher.publish(tensors)  # makes the arena, which a trainer pays for once
        with streaming(engine, settings) as arrivals:
            updates = _update_now_and_then(settings, screen, arrivals, publisher, tensors)
    numbers = _numbers(arrivals, updates, copies)
    return BenchResult(
        benchmark="pause",
        config={"settings": settings, "num_threads": torch.get_num_threads()},
        numbers=numbers,
        headline=_headline(numbers),
        tables=(_table(numbers),),
        has_picture=True,
    )


def _kv_bytes(settings: PauseBench) -> int:
    model = settings.model
    token = 2 * model.num_layers * model.num_kv_heads * model.head_dim
    return settings.batch_size * _CONTEXT * token * DTYPES[settings.dtype].itemsize + (1 << 20)


@contextmanager
def streaming(engine: Engine, settings: PauseBench) -> Iterator[Arrivals]:
    """A client on a thread of its own, which notes when tokens arrive and starts over when all have ended."""
    arrivals = Arrivals([[] for _ in range(settings.batch_size)])

    def run() -> None:
        generator = torch.Generator().manual_seed(0)
        size = (settings.batch_size, settings.prompt_tokens)
        prompts = torch.randint(settings.model.vocab_size, size, generator=generator).tolist()
        params = {
            "max_new_tokens": _CONTEXT - settings.prompt_tokens,
            "ignore_eos": True,
            "temperature": 1.0,
        }
        try:
            while not arrivals.stopped.is_set():
                for chunk in engine.generate(
                    input_ids=prompts, sampling_params=params, stream=True
                ):
                    arrivals.times[chunk["index"]].append(time.perf_counter())
                    if arrivals.stopped.is_set():
                        break
                for times in arrivals.times:
                    times.append(math.nan)  # no gap lies between two streams
        except BaseException as error:
            arrivals.failure = error

    client = threading.Thread(target=run, name="bench-client")
    client.start()
    try:
        yield arrivals
    finally:
        arrivals.stopped.set()
        client.join(timeout=60)
    if arrivals.failure is not None:
        raise arrivals.failure


def _update_now_and_then(
    settings: PauseBench,
    screen: Screen,
    arrivals: Arrivals,
    publisher: WeightPublisher,
    tensors: dict[str, torch.Tensor],
) -> list[Update]:
    while arrivals.num_tokens < _LEAST_TOKENS and arrivals.failure is None:
        time.sleep(0.01)
    updates: list[Update] = []
    with screen.progress("updates under a stream", settings.syncs) as advance:
        time.sleep(settings.quiet_s)
        for _ in range(settings.syncs):
            move_a_little(tensors)
            start = time.perf_counter()
            report = publisher.publish(tensors)
            updates.append(Update(start=start, end=time.perf_counter(), report=report))
            advance(f"pause {report.pause_s * 1e3:.1f} ms")
            time.sleep(settings.quiet_s)
            if arrivals.failure is not None or arrivals.stopped.is_set():
                break
    return updates


def _numbers(
    arrivals: Arrivals, updates: Sequence[Update], copies: Sequence[float]
) -> dict[str, Any]:
    """Each update's worst gap, next to the worst gap of the quiet time before it, of equal length."""
    with_update, without, excess = [], [], []
    for update in updates:
        took = update.end - update.start
        busy = arrivals.worst(update.start, update.end)
        quiet = arrivals.worst(update.start - took - busy, update.start - busy)
        with_update.append(busy)
        without.append(quiet)
        excess.append(busy - quiet)
    first, last = updates[0].start, updates[-1].end
    disturbed = [(update.start, update.end) for update in updates]
    steps = [
        length
        for end, length in arrivals.gaps(first - 1.0, last)
        if not any(start <= end and end - length <= stop for start, stop in disturbed)
    ]
    limit = summary(steps)["p50"] + 1.5 * summary(copies)["p50"]
    origin = updates[0].start
    return {
        "plain_copy_s": summary(copies),
        "decode_step_s": summary(steps),
        "worst_gap_with_update_s": summary(with_update),
        "worst_gap_without_s": summary(without),
        "excess_s": summary(excess),
        "limit_s": limit,
        "share_within_limit": sum(value <= limit for value in excess) / len(excess),
        "engine": {
            name: summary([getattr(update.report, name) for update in updates])
            for name in ("pause_s", "copy_s", "verify_s", "begin_to_verified_s", "pack_s")
        },
        "publish_s": summary([update.end - update.start for update in updates]),
        "series": {
            "excess_s": excess,
            "updates": [(u.start - origin, u.end - origin) for u in updates],
            "gaps": [(end - origin, length) for end, length in arrivals.gaps(first - 1.0, last)],
        },
    }


def _headline(numbers: dict[str, Any]) -> tuple[Headline, ...]:
    excess, limit = numbers["excess_s"], numbers["limit_s"]
    step, copy = numbers["decode_step_s"]["p50"], numbers["plain_copy_s"]["p50"]
    at_most = f"at most {limit * 1e3:.0f} ms (step {step * 1e3:.0f} + 1.5 x copy {copy * 1e3:.0f})"
    return tuple(
        Headline(
            what=f"longest wait for a token because of an update, {words}",
            measured=f"{excess[key] * 1e3:.0f} ms",
            floor=f"{copy * 1e3:.0f} ms (one copy)",
            ratio=f"{excess[key] / copy:.2f}",
            target=at_most,
            met=excess[key] <= limit,
        )
        for key, words in (("p50", "median"), ("p90", "p90"))
    )


def _table(numbers: dict[str, Any]) -> Table:
    """Every series."""
    series = {
        name.removesuffix("_s").replace("_", " "): values
        for name, values in {**numbers, **numbers["engine"]}.items()
        if isinstance(values, dict) and "p50" in values
    }
    keys = ("min", "p10", "p50", "p90", "max")
    rows: list[tuple[str, ...]] = [
        (name, *(f"{values[key] * 1e3:.1f}" for key in keys)) for name, values in series.items()
    ]
    return "a stream under updates, ms", ("", *keys), rows
