"""Searches for which products of a few rows the kernel beats torch's, and with which launch, and stores what it finds.

    rollout bench gpu few-rows [--write] [--out results.json]

Each product is timed in a CUDA graph over so many copies of its weights that they exceed the cache, beside the floor:
its weights at the rate of a pass that only reads. A shape for which no launch is three hundredths faster than torch is
stored as torch's. Shapes are the products of the models below on one GPU, in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import linear

from rollout_kernels import few_rows_matmul as kernels
from rollout_kernels.compiling import compile_ahead
from rollout_kernels.expert_configs import TileConfig
from rollout_kernels.few_rows_matmul import few_rows_linear
from rollout_kernels.launching import device_name

from .attention_kernels import timed
from .expert_kernels import measure_rates, stored

ROWS = (1, 2, 4, 8, 16)
"""Each becomes a limit; a launch has the same programs for up to 8."""
MODELS = {
    "Qwen3-0.6B": (1024, 2048, 1024, 3072),
    "Qwen3-1.7B": (2048, 2048, 1024, 6144),
    "Qwen3-4B": (2560, 4096, 1024, 9728),
    "Qwen3-8B": (4096, 4096, 1024, 12288),
    "Qwen3-30B-A3B": (2048, 4096, 512, 0),
    "Qwen2.5-1.5B": (1536, 1536, 256, 8960),
    "Qwen2.5-7B": (3584, 3584, 512, 18944),
    "Llama-3.2-1B": (2048, 2048, 512, 8192),
    "Llama-3.2-3B": (3072, 3072, 1024, 8192),
    "Llama-3.1-8B": (4096, 4096, 1024, 14336),
}
"""Hidden size, width of all queries, of all keys, of the feed-forward part where that is dense."""
_CACHE_BYTES = 160 << 20
_LEAST_GAIN = 0.97
_MOST_SHARED_BYTES = 200 << 10


def shapes() -> list[tuple[int, int]]:
    """(N, K) of every product, once each."""
    found: dict[tuple[int, int], None] = {}
    for hidden, queries, keys, inner in MODELS.values():
        found |= dict.fromkeys(((queries + 2 * keys, hidden), (hidden, queries)))
        if inner:
            found |= dict.fromkeys(((2 * inner, hidden), (hidden, inner)))
    return list(found)


def candidates() -> Iterator[TileConfig]:
    """Launches that fit into shared memory and keep each warp busy."""
    for columns, depths in ((16, (128, 256, 512)), (32, (64, 128, 256)), (64, (64, 128))):
        for depth in depths:
            for warps in (1, 2, 4):
                for stages in (2, 4, 6):
                    num_bytes = stages * depth * (columns + kernels.FEW_ROWS) * 2
                    if num_bytes <= _MOST_SHARED_BYTES and columns * depth <= warps * 8192:
                        yield TileConfig(columns=columns, depth=depth, warps=warps, stages=stages)


def search(
    products: Sequence[tuple[int, int]],
    device: torch.device,
    say: Callable[[str], None],
    launches: Sequence[TileConfig],
    keep: Callable[[list[dict[str, Any]]], None],
) -> dict[str, Any]:
    """The entries of this device, which `keep` gets after each product too, and every measurement."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    read = measure_rates(device, dtype).read
    entries, measured = [], []
    for columns, depth in products:
        copies = max(1, -(-_CACHE_BYTES // (columns * depth * 2))) if device.type == "cuda" else 1
        weights = torch.empty(copies, columns, depth, dtype=dtype, device=device).normal_(0, 0.02)
        floor = weights[0].nbytes / read
        if device.type == "cuda":
            _compile(weights[0], launches)
        timings: dict[TileConfig, float] = {}
        for rows in sorted(ROWS, reverse=True):
            x = torch.randn(rows, depth, device=device).to(dtype)
            usual = _seconds(partial(linear, x), weights)
            tried: Sequence[TileConfig] = launches
            if timings:  # The best for more rows; fewer than 8 are padded to 8.
                ordered = sorted(timings, key=lambda launch: timings[launch])
                tried = ordered[: 12 if rows == ROWS[-2] else 2]
            timings, failure = {}, None
            for launch in tried:
                ours = partial(few_rows_linear, x, bias=None, out=None, config=launch)
                try:
                    timings[launch] = _seconds(ours, weights)
                except Exception as error:  # one that does not fit on this device
                    failure = error
            if not timings:
                raise RuntimeError(
                    f"{columns} x {depth}: none of {len(tried)} launches ran"
                ) from failure
            best = min(timings, key=lambda launch: timings[launch])
            least = timings[best]
            gains = least < _LEAST_GAIN * usual
            entry = {"outputs": columns, "inputs": depth, "max_rows": rows}
            entries.append({**entry, "launch": asdict(best) if gains else None})
            times = {"torch_us": 1e6 * usual, "us": 1e6 * least, "floor_us": 1e6 * floor}
            tries = [{**asdict(each), "us": 1e6 * timings[each]} for each in timings]
            measured.append({**entries[-1], **times, "tries": tries})
            say(
                f"{columns} x {depth}, {rows} rows: torch {1e6 * usual:.1f} us, ours {1e6 * least:.1f}"
                f"{'' if gains else ', not taken'}, floor {1e6 * floor:.1f}; {best}"
            )
        keep(entries)
    return {"entries": merged([], entries), "rows": measured, "read_bytes_per_s": read}


def merged(before: list[dict[str, Any]], found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Entries of one device: those found, and of other products those of before; in order."""

    def product(entry: dict[str, Any]) -> tuple[int, int]:
        return entry["outputs"], entry["inputs"]

    anew = set(map(product, found))
    kept = [entry for entry in before if product(entry) not in anew]
    return sorted([*kept, *found], key=lambda entry: (*product(entry), entry["max_rows"]))


def _compile(weight: torch.Tensor, launches: Sequence[TileConfig]) -> None:
    # What cannot be compiled fails again when it is timed.
    with suppress(Exception), compile_ahead():
        for rows in (ROWS[0], ROWS[-2], ROWS[-1]):  # Those between are launched as the middle ones.
            x = weight.new_empty(rows, weight.shape[1])
            for launch in launches:
                few_rows_linear(x, weight, None, None, launch)


def _seconds(call: Callable[[torch.Tensor], object], weights: torch.Tensor) -> float:
    """Of one call."""

    def all_copies() -> None:
        for weight in weights:
            call(weight)

    return timed(all_copies, weights.device) / len(weights)


def main(arguments: Sequence[str]) -> int:
    """Search, print, and write where asked."""
    parser = argparse.ArgumentParser(description="Search the launches of products of a few rows.")
    parser.add_argument("--write", action="store_true", help="store what was found for this device")
    parser.add_argument("--out", type=Path, help="every measurement, as JSON")
    parser.add_argument("--tiny", action="store_true", help="little data; needs no GPU")
    options = parser.parse_args(arguments)
    if not options.tiny and not torch.cuda.is_available():
        print("rollout bench gpu few-rows: got no GPU, expected one; --tiny needs none")
        return 2
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    products, launches = shapes(), list(candidates())
    if options.tiny:
        products, launches = [(64, 96)], launches[:2]

    def say(line: str) -> None:
        print(line, flush=True)

    name = device_name(device)
    before = json.loads(kernels.FILE.read_text()).get(name, [])

    def keep(entries: list[dict[str, Any]]) -> None:
        if options.write:
            stored(kernels.FILE, name, merged(before, entries))

    found = search(products, device, say, launches, keep)
    if options.out:
        options.out.write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
