"""Searches the shapes of the expert kernels' launches on this device, and writes them where the kernels find them.

    python -m rollout_benchmarks.expert_kernels [--write] [--out results.json] [--shape 2048 768 128 8]

Every candidate is compiled first, in several threads; then each product is timed as a CUDA graph over several draws of
experts, which together exceed the cache, beside its floor: the greater of its bytes over the rate of reads and its
operations over the rate of a large product. With --write, `kernels/expert_configs.json` gets the best entries under the
device's name. 16-bit types are searched; others get tiles of as many bytes.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from rollout_kernels import expert_configs as configs
from rollout_kernels import grouped_experts as kernels
from rollout_kernels.expert_configs import ExpertConfig, TileConfig, expert_config
from rollout_kernels.expert_routing import Routing, Tiles, choose_experts, sort_rows
from rollout_kernels.launching import launching_on

from .attention_kernels import timed

SIZES = (1, 8, 64, 256, 1024, 8192)
"""Tokens of a call; each becomes an entry, with a limit half-way to the next."""
_DRAWS = 6
_COMPILERS = 12
"""On a GPU; the interpreter runs in one thread."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What the device can do."""

    read: float
    """Bytes per second of a pass that only reads."""
    multiply: float
    """Operations per second of a large product in the weights' dtype."""

    def floor(self, num_bytes: float, operations: float) -> float:
        """Seconds."""
        return max(num_bytes / self.read, operations / self.multiply)


def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """In a few hundred milliseconds."""
    on_cuda = device.type == "cuda"
    data = torch.ones(1 << (29 if on_cuda else 22), dtype=torch.int32, device=device)
    side = 8192 if on_cuda else 256
    square = torch.ones(side, side, dtype=dtype, device=device)
    return Rates(
        read=data.nbytes / timed(data.amax, device),
        multiply=2 * side**3 / timed(lambda: torch.mm(square, square), device),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """The experts of one layer, with random weights."""

    gate_up: torch.Tensor
    """(X, 2 I, E)."""
    down: torch.Tensor
    """(X, E, I)."""
    top_k: int
    """k."""

    @classmethod
    def make(
        cls, hidden: int, size: int, num_experts: int, top_k: int, dtype: torch.dtype
    ) -> Layer:
        """On CUDA, where there is one."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        gate_up = torch.empty(num_experts, 2 * size, hidden, dtype=dtype, device=device)
        down = torch.empty(num_experts, hidden, size, dtype=dtype, device=device)
        return cls(gate_up=gate_up.normal_(0, 0.02), down=down.normal_(0, 0.02), top_k=top_k)


class Calls:
    """Calls of one size over several draws of experts, so that weights are not in the cache."""

    def __init__(self, layer: Layer, num_tokens: int) -> None:
        self.layer, self.num_tokens = layer, num_tokens
        self.device, dtype = layer.down.device, layer.down.dtype
        num_experts, hidden, _ = layer.down.shape
        self.num_rows = num_tokens * layer.top_k
        torch.manual_seed(num_tokens)
        draws = _DRAWS if num_tokens < 1024 else 1
        if self.device.type != "cuda":
            draws = 1
        self.logits = torch.randn(draws, num_tokens, num_experts, device=self.device).to(dtype)
        self.x = torch.randn(num_tokens, hidden, device=self.device).to(dtype)
        self.routing = Routing(
            top_k=layer.top_k,
            sigmoid=False,
            normalise=True,
            scale=1.0,
            num_groups=1,
            top_groups=1,
            rounded=True,
        )
        self.chosen = [choose_experts(logits, None, self.routing) for logits in self.logits]
        self.touched = sum(len(ids.unique()) for _, ids in self.chosen) / draws
        """Experts that a call reads."""

    def seconds(self, call: Callable[[int], object]) -> float:
        """Of `call(draw)`."""

        def all_draws() -> None:
            with launching_on(self.x):
                for draw in range(len(self.chosen)):
                    call(draw)

        return timed(all_draws, self.device) / len(self.chosen)

    def tiles(self, rows: int) -> list[Tiles]:
        """The sorted rows of each draw."""
        num_experts = len(self.layer.down)
        return [sort_rows(ids, 0, num_experts, rows) for _, ids in self.chosen]

    def gate_up_call(self, rows: int, config: TileConfig) -> Callable[[int], object]:
        """The first product of a draw."""
        tiles, x, weight = self.tiles(rows), self.x, self.layer.gate_up
        return lambda n: kernels.gate_up_product(x, weight, tiles[n], rows, config)

    def down_call(self, rows: int, config: TileConfig) -> Callable[[int], object]:
        """The second product of a draw."""
        tiles, weight = self.tiles(rows), self.layer.down
        inner = torch.randn(self.num_rows, weight.shape[2], device=self.device).to(weight.dtype)
        return lambda n: kernels.down_product(inner, weight, tiles[n], rows, config)

    def floors(self, rates: Rates) -> dict[str, float]:
        """Seconds of each product, and of both: each weight that is needed read once, activations read and written."""
        _, hidden, size = self.layer.down.shape
        width = self.layer.down.element_size()
        expert, wide, inner = hidden * size, self.num_tokens * hidden, self.num_rows * size
        gate_up = rates.floor(
            width * (2 * self.touched * expert + wide + inner), 4 * self.num_rows * expert
        )
        down = rates.floor(
            width * (self.touched * expert + inner + self.num_rows * hidden),
            2 * self.num_rows * expert,
        )
        both = rates.floor(
            width * (3 * self.touched * expert + 2 * wide), 6 * self.num_rows * expert
        )
        return {"gate_up": gate_up, "down": down, "all": both}

    def parts(self, config: ExpertConfig, rates: Rates) -> dict[str, Any]:
        """Microseconds of each launch and of all, in the shape that is stored, and their floors."""
        layer, rows = self.layer, config.rows
        num_experts = len(layer.down)

        def choose(draw: int) -> object:
            return choose_experts(self.logits[draw], None, self.routing)

        def sort(draw: int) -> object:
            return sort_rows(self.chosen[draw][1], 0, num_experts, rows)

        def whole(draw: int) -> object:
            return kernels.grouped_experts(
                self.x, *self.chosen[draw], layer.gate_up, layer.down, config=config
            )

        calls = {
            "choose": choose,
            "sort": sort,
            "gate_up": self.gate_up_call(rows, config.gate_up),
            "down": self.down_call(rows, config.down),
            "all": whole,
        }
        return {
            "touched": self.touched,
            "us": {name: 1e6 * self.seconds(call) for name, call in calls.items()},
            "floor_us": {name: 1e6 * floor for name, floor in self.floors(rates).items()},
        }


def stored_config(calls: Calls) -> ExpertConfig:
    """The shape that the kernels choose themselves."""
    down = calls.layer.down
    return expert_config(
        down.device, num_rows=calls.num_rows, num_experts=len(down), dtype=down.dtype
    )


def row_candidates(rows_per_expert: float) -> tuple[int, ...]:
    """Rows of a tile."""
    if rows_per_expert <= 4:
        return (16,)
    if rows_per_expert <= 16:
        return (16, 32)
    return (32, 64, 128) if rows_per_expert <= 128 else (64, 128)


def candidates(rows: int, first: bool) -> Iterator[TileConfig]:
    """Of the first product, or of the second."""
    few = [
        (16, 256, 4, 4), (32, 64, 4, 5), (32, 128, 4, 3), (32, 128, 4, 4), (32, 256, 4, 3), (64, 64, 4, 4),
        (64, 64, 4, 6), (64, 128, 4, 3), (64, 128, 4, 4), (64, 128, 8, 4), (64, 256, 4, 2), (128, 64, 4, 4),
        (128, 128, 8, 3),
    ]  # fmt: skip
    many = [
        (64, 64, 4, 3), (64, 64, 4, 4), (64, 128, 4, 3), (128, 32, 8, 4), (128, 64, 4, 3), (128, 64, 8, 3),
        (128, 64, 8, 4), (128, 128, 8, 2),
    ]  # fmt: skip
    if not first:
        few += [(32, 256, 4, 2), (128, 128, 4, 3)]
        many += [(256, 64, 8, 3), (128, 64, 4, 4)]
    for columns, depth, warps, stages in few if rows <= 32 else many:
        yield TileConfig(columns=columns, depth=depth, warps=warps, stages=stages)


def search(layer: Layer, sizes: Sequence[int], say: Callable[[str], None]) -> dict[str, Any]:
    """The entries of this device, and every measurement."""
    rates = measure_rates(layer.down.device, layer.down.dtype)
    say(f"reads {rates.read / 1e9:.0f} GB/s, multiplies {rates.multiply / 1e12:.0f} TFLOP/s")
    calls = [Calls(layer, size) for size in sizes]
    ratios = [each.num_rows / len(layer.down) for each in calls]
    jobs = {
        (rows, first, config)
        for ratio in ratios
        for rows in row_candidates(ratio)
        for first in (True, False)
        for config in candidates(rows, first)
    }

    def compiled(job: tuple[int, bool, TileConfig]) -> str | None:
        rows, first, config = job
        try:
            make = calls[-1].gate_up_call if first else calls[-1].down_call
            with launching_on(layer.down):
                make(rows, config)(0)
            if layer.down.is_cuda:
                torch.cuda.synchronize()
        except Exception as error:
            return repr(error)[:200]
        return None

    start = time.perf_counter()
    workers = _COMPILERS if layer.down.is_cuda else 1
    with ThreadPoolExecutor(workers) as pool:  # Most of the compiler holds no lock.
        failed = dict(zip(jobs, pool.map(compiled, jobs), strict=True))
    say(f"{len(jobs)} candidates compiled in {time.perf_counter() - start:.0f} s")
    entries, measured = [], []
    for number, (each, ratio) in enumerate(zip(calls, ratios, strict=True)):
        found: list[tuple[float, ExpertConfig]] = []
        floors = each.floors(rates)
        for rows in row_candidates(ratio):
            best: dict[str, tuple[float, TileConfig]] = {}
            for name in ("gate_up", "down"):
                first = name == "gate_up"
                make = each.gate_up_call if first else each.down_call
                timings = [
                    (each.seconds(make(rows, config)), config)
                    for config in candidates(rows, first)
                    if failed[rows, first, config] is None
                ]
                best[name] = min(timings, key=lambda timing: timing[0])
                for seconds, config in timings:
                    row = {"tokens": each.num_tokens, "rows": rows, "product": name}
                    measured.append({**row, **asdict(config), "us": 1e6 * seconds})
                shape = "x".join(str(value) for value in asdict(best[name][1]).values())
                say(
                    f"T={each.num_tokens} rows={rows} {name}: {1e6 * best[name][0]:.1f} us, floor "
                    f"{1e6 * floors[name]:.1f}, {shape}"
                )
            both = ExpertConfig(rows=rows, gate_up=best["gate_up"][1], down=best["down"][1])
            found.append((best["gate_up"][0] + best["down"][0], both))
        entry = asdict(min(found, key=lambda pair: pair[0])[1])
        if number + 1 < len(ratios):
            entry = {
                "max_rows_per_expert": round(math.sqrt(ratio * ratios[number + 1]), 2),
                **entry,
            }
        entries.append(entry)
    errors = sorted({error for error in failed.values() if error is not None})
    return {"entries": entries, "rows": measured, "errors": errors, "rates": asdict(rates)}


def stored(file: Path, device: str, entries: list[dict[str, Any]]) -> None:
    """Put the entries of `device` into the file, one line each."""
    everything = json.loads(file.read_text())
    everything[device] = entries
    parts = [
        f"  {json.dumps(name)}: [\n    "
        + ",\n    ".join(json.dumps(entry) for entry in listed)
        + "\n  ]"
        if isinstance(listed, list)
        else f"  {json.dumps(name)}: {json.dumps(listed)}"
        for name, listed in everything.items()
    ]
    file.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def main(arguments: Sequence[str]) -> int:
    """Search, print, and write where asked."""
    parser = argparse.ArgumentParser(description="Search the shapes of the expert kernels.")
    parser.add_argument("--write", action="store_true", help="store the best for this device")
    parser.add_argument("--out", type=Path, help="every measurement, as JSON")
    parser.add_argument(
        "--shape",
        type=int,
        nargs=4,
        default=(2048, 768, 128, 8),
        help="hidden size, inner width, experts, experts of a token",
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=SIZES, help="sizes of calls")
    options = parser.parse_args(arguments)
    hidden, size, num_experts, top_k = options.shape

    def say(line: str) -> None:
        print(line, flush=True)

    layer = Layer.make(hidden, size, num_experts, top_k, torch.bfloat16)
    found = search(layer, options.tokens, say)
    for line in (*found["errors"], *(json.dumps(entry) for entry in found["entries"])):
        say(line)
    if options.out:
        options.out.write_text(json.dumps(found))
    if options.write:
        stored(configs.FILE, torch.cuda.get_device_name(), found["entries"])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
