"""Searches the shapes of the attention kernels' launches on this device, and writes them where the kernels find them.

    python -m rollout_benchmarks.attention_kernels [--write] [--out results.json]

Every candidate is compiled first, in as many processes as there are cores; then each is timed as a CUDA graph over
pools that exceed the cache. Decodes are given in bytes of keys and values per second (each sequence's own counted once,
shared prefixes once per group), prefills in floating-point operations per second, beside torch's own attention. With
--write, `kernels/attention_configs.json` gets the best entries under the device's name.

16-bit types are searched; float32 is for comparisons, and keeps the default entries. In deterministic entries the keys
of a tile are given, because decode, shared prefixes and prefill have to agree on them.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from rollout_kernels import attention_configs as configs
from rollout_kernels import paged_decode as decode
from rollout_kernels import paged_prefill as prefill
from rollout_kernels import shared_prefix_decode as shared
from rollout_kernels import shared_prefixes as host

KV_HEADS, GROUP = 8, 4
HEAD_DIMS = (64, 128, 256)
"""Each is the upper limit of a class."""
EXACT_KEYS = {64: 64, 128: 64, 256: 32}
"""Keys of a tile in deterministic entries."""
DECODE_PROGRAMS = 400
SHARED_PROGRAMS = 1056
_MAX_LEN = 1024
Config = Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What a candidate is timed on."""

    kind: str
    """`decode`, `shared` or `prefill`."""
    head_dim: int
    """D."""
    lengths: tuple[int, ...]
    """Keys of each sequence."""
    block_size: int = 16
    """S."""
    group: int = GROUP
    """G."""
    deterministic: bool = False
    """As of the kernels."""
    samples: int = 1
    """Sequences that share a prefix."""
    prefix: int = 0
    """Keys of it."""

    def small(self) -> Problem:
        """The same kernels on little data."""
        few = self.lengths[:8] if self.kind != "prefill" else (256,)
        return Problem(**{**asdict(self), "lengths": few})

    def work(self) -> float:
        """Bytes of a decode, operations of a prefill."""
        if self.kind == "prefill":
            return (
                sum(4 * n * (n + 1) / 2 for n in self.lengths)
                * self.group
                * KV_HEADS
                * self.head_dim
            )
        tokens = sum(self.lengths) - self.prefix * (
            len(self.lengths) - len(self.lengths) // self.samples
        )
        return tokens * KV_HEADS * self.head_dim * 4


class Run:
    """A problem's tensors on the GPU, and its kernel as something to call."""

    def __init__(self, problem: Problem, num_pools: int) -> None:
        self.problem = problem
        torch.manual_seed(0)
        tables, num_blocks = _tables(problem)
        width = -(-_MAX_LEN * 2 // problem.block_size)
        padded = [[*table, *[0] * (width - len(table))] for table in tables]
        self.tables = torch.tensor(padded, dtype=torch.int32, device="cuda")
        self.seq_lens = torch.tensor(problem.lengths, dtype=torch.int32, device="cuda")
        shape = (num_blocks, problem.block_size, 2, KV_HEADS, problem.head_dim)
        self.pools = [
            torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(num_pools)
        ]
        batch, heads = len(problem.lengths), problem.group * KV_HEADS
        rows = sum(problem.lengths) if problem.kind == "prefill" else batch
        self.q = torch.randn((rows, heads, problem.head_dim), device="cuda", dtype=torch.bfloat16)
        self.out = torch.empty_like(self.q)
        starts = [sum(problem.lengths[:n]) for n in range(batch + 1)]
        self.starts = torch.tensor(starts, dtype=torch.int32, device="cuda")
        sizes = {"num_heads": heads, "num_kv_heads": KV_HEADS, "head_dim": problem.head_dim}
        self.workspace = decode.DecodeWorkspace.allocate(max_batch=batch, **sizes, device="cuda")
        self.state = shared.SharedState.allocate(max_batch=batch, **sizes, device="cuda")
        shareable = [
            table[: (length - 1) // problem.block_size]
            for table, length in zip(tables, problem.lengths, strict=True)
        ]
        self.groups = host.find_shared_prefixes(shareable, block_size=problem.block_size)

    def call(self, config: Config) -> Callable[[], None]:
        """One launch over each pool."""
        problem = self.problem
        q, out = self.q, self.out
        common: dict[str, Any] = {"scale": problem.head_dim**-0.5}
        common["deterministic"] = problem.deterministic
        if problem.kind == "prefill":
            longest = max(problem.lengths)

            def launch(pool: torch.Tensor) -> None:
                prefill.paged_prefill(
                    q, pool, self.tables, self.starts, self.seq_lens, out,
                    max_query_len=longest, config=config, **common,
                )  # fmt: skip
        elif problem.kind == "decode":

            def launch(pool: torch.Tensor) -> None:
                decode.paged_decode(
                    q, pool, self.tables, self.seq_lens, out,
                    workspace=self.workspace, max_len=_MAX_LEN, config=config, **common,
                )  # fmt: skip
        else:
            tiles = self._shared_prefixes(config)

            def launch(pool: torch.Tensor) -> None:
                shared.shared_prefix_decode(
                    q, pool, self.tables, self.seq_lens, out,
                    shared=tiles, workspace=self.workspace, state=self.state,
                    max_len=_MAX_LEN, prefix_config=config, **common,
                )  # fmt: skip

        def call() -> None:
            for pool in self.pools:
                launch(pool)

        return call

    def _shared_prefixes(self, config: configs.SharedConfig) -> host.SharedPrefixes:
        batch, problem = len(self.problem.lengths), self.problem
        numbers = host.packed(
            self.groups,
            max_batch=batch,
            block_size=problem.block_size,
            members_per_tile=shared.tile_rows_of(config, problem.group) // problem.group,
        )
        buffer = torch.tensor(numbers, dtype=torch.int32, device="cuda")
        return host.SharedPrefixes.views(buffer, batch)


def _tables(problem: Problem) -> tuple[list[list[int]], int]:
    """Block tables in random order, and how many blocks they use."""
    size = problem.block_size
    common, used = problem.prefix // size, 0
    tables: list[list[int]] = []
    for n, length in enumerate(problem.lengths):
        if n % problem.samples == 0:
            prefix = list(range(used, used + common))
            used += common
        own = -(-length // size) - common
        tables.append([*prefix, *range(used, used + own)])
        used += own
    order = list(range(used))
    random.Random(0).shuffle(order)
    return [[order[block] for block in table] for table in tables], used


def timed(call: Callable[[], Any], repetitions: int = 9) -> float:
    """Median seconds of a replay of `call` as a CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    graph.replay()
    events = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        for _ in range(repetitions)
    ]
    for begin, end in events:
        begin.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    times = sorted(begin.elapsed_time(end) for begin, end in events)
    return times[len(times) // 2] / 1e3


def decode_candidates(keys: int | None, programs: int) -> Iterator[configs.DecodeConfig]:
    """Of all sizes of tiles, or of one."""
    for size, warps, stages in (
        (64, 2, 3), (64, 4, 3), (64, 2, 4), (128, 4, 3), (32, 2, 3), (32, 4, 3), (32, 4, 4), (32, 2, 2),
        (64, 4, 5), (64, 2, 7), (32, 2, 7),
    ):  # fmt: skip
        if keys in (None, size):
            yield configs.DecodeConfig(
                keys=size, warps=warps, stages=stages, programs=programs, split_keys=64
            )


def shared_candidates(keys: int | None) -> Iterator[configs.SharedConfig]:
    """Of all sizes of tiles, or of one."""
    for rows, size, warps, stages in (
        (32, 64, 2, 3), (32, 64, 4, 3), (16, 64, 2, 3), (64, 64, 4, 3), (32, 32, 2, 3), (32, 32, 4, 3),
    ):  # fmt: skip
        if keys in (None, size):
            yield configs.SharedConfig(
                rows=rows, keys=size, warps=warps, stages=stages, programs=SHARED_PROGRAMS
            )


def prefill_candidates(keys: int | None, head_dim: int) -> Iterator[configs.PrefillConfig]:
    """Of all sizes of tiles, or of one."""
    shapes = [
        (64, 32, 4, 3, 0), (64, 64, 4, 3, 0), (64, 64, 4, 2, 0), (128, 32, 8, 3, 0), (128, 64, 8, 3, 0),
    ]  # fmt: skip
    if head_dim <= 128:
        shapes += [
            (64, 32, 4, 3, 128),
            (128, 128, 8, 3, 0),
            (128, 64, 4, 3, 0),
            (64, 64, 4, 3, 160),
        ]
    else:
        shapes += [(64, 32, 4, 2, 0), (128, 32, 8, 2, 0), (128, 64, 8, 2, 0)]
    for rows, size, warps, stages, registers in shapes:
        if keys in (None, size):
            yield configs.PrefillConfig(
                rows=rows, keys=size, warps=warps, stages=stages, registers=registers
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """A problem, its candidates, and the limits of the entry that the best of them becomes."""

    name: str
    """In `attention_configs.json`."""
    problem: Problem
    """What they are timed on."""
    candidates: tuple[Config, ...]
    """Among which to choose."""
    limits: tuple[tuple[str, int], ...]
    """Of the entry."""


def searches(head_dims: Sequence[int]) -> list[Search]:
    """In the order of the entries."""
    rng = random.Random(0)
    many = tuple(rng.randint(530, 660) for _ in range(256))
    group = tuple(512 + min(500, 1 + int(rng.expovariate(1 / 200))) for _ in range(512))
    prompts = (2048,) * 8
    found: list[Search] = []
    for size in head_dims:
        limit = {"dtype_bytes": 2, "max_head_dim": size}
        exact = EXACT_KEYS[size]

        def add(name: str, problem: Problem, candidates: Iterator[Config], **more: int) -> None:
            limits = tuple({**limit, **more}.items())  # noqa: B023
            found.append(
                Search(name=name, problem=problem, candidates=tuple(candidates), limits=limits)
            )

        for lengths in (many[:8], many):
            more = {} if lengths is many else {"max_programs": 256}
            facts: dict[str, Any] = {"kind": "decode", "head_dim": size, "lengths": lengths}
            add("decode", Problem(**facts), decode_candidates(None, DECODE_PROGRAMS), **more)
            add(
                "decode_deterministic",
                Problem(**facts, deterministic=True),
                decode_candidates(exact, 0),
                **more,
            )
        rl: dict[str, Any] = {"kind": "shared", "head_dim": size, "lengths": group}
        rl |= {"samples": 8, "prefix": 512}
        add("shared", Problem(**rl), shared_candidates(None))
        add("shared_deterministic", Problem(**rl, deterministic=True), shared_candidates(exact))
        for whole in (True, False):
            more = {"whole_tiles": True} if whole else {}
            text: dict[str, Any] = {"kind": "prefill", "head_dim": size, "lengths": prompts}
            text["block_size"] = 128 if whole else 16
            add("prefill", Problem(**text), prefill_candidates(None, size), **more)
            add(
                "prefill_deterministic",
                Problem(**text, deterministic=True),
                prefill_candidates(exact, size),
                **more,
            )
    return found


def compiled(job: tuple[Problem, Config]) -> str | None:
    """Compile a candidate's kernels into triton's cache; None, or why it cannot be."""
    problem, config = job
    try:
        Run(problem.small(), 1).call(config)()
        torch.cuda.synchronize()
    except Exception as error:
        return repr(error)[:200]
    return None


def search(head_dims: Sequence[int], say: Callable[[str], None]) -> dict[str, Any]:
    """The entries of this device, and every measurement."""
    wanted = searches(head_dims)
    jobs = [(each.problem, config) for each in wanted for config in each.candidates]
    workers = min(15, max(1, (os.cpu_count() or 2) - 1))
    with ThreadPoolExecutor(workers) as pool:  # Most of the compiler works without Python's lock.
        failed = dict(zip(jobs, pool.map(compiled, jobs), strict=True))
    entries: dict[str, list[dict[str, Any]]] = {}
    rows: list[dict[str, Any]] = []
    run: Run | None = None
    for each in wanted:
        problem = each.problem
        work = problem.work()
        if run is None or run.problem != problem:
            run = None
            torch.cuda.empty_cache()
            num_pools = 1 if problem.kind == "prefill" else min(16, math.ceil(5e8 / work) + 2)
            run = Run(problem, num_pools)
        timings: list[tuple[float, Config]] = []
        for config in each.candidates:
            why = failed[problem, config]
            seconds = math.inf if why else timed(run.call(config)) / len(run.pools)
            timings.append((seconds, config))
            row = {"entry": each.name, **asdict(problem), **asdict(config)}
            del row["lengths"]
            rows.append(
                {**row, "seconds": None if why else seconds, "rate": work / seconds, "error": why}
            )
        seconds, best = min(timings, key=lambda timing: timing[0])
        unit = "TFLOP/s" if problem.kind == "prefill" else "GB/s"
        rate = work / seconds / (1e12 if problem.kind == "prefill" else 1e9)
        label = f"{each.name} D={problem.head_dim} N={len(problem.lengths)} S={problem.block_size}"
        say(f"{label:48} {seconds * 1e6:9.1f} us {rate:7.0f} {unit:8} {asdict(best)}")
        chosen = {name: value for name, value in asdict(best).items() if value}
        if problem.deterministic:  # nothing is split
            chosen = {
                name: chosen[name] for name in chosen if name not in ("split_keys", "programs")
            }
        entries.setdefault(each.name, []).append({**dict(each.limits), **chosen})
    return {"device": torch.cuda.get_device_name(), "entries": entries, "rows": rows}


def torch_prefill(head_dim: int, say: Callable[[str], None]) -> None:
    """What torch's own attention takes for the same prompts, contiguous."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    problem = Problem(kind="prefill", head_dim=head_dim, lengths=(2048,) * 8)
    shape = (8, GROUP * KV_HEADS, 2048, head_dim)
    q, k, v = (
        torch.randn((8, heads, *shape[2:]), device="cuda", dtype=torch.bfloat16)
        for heads in (shape[1], KV_HEADS, KV_HEADS)
    )
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        with sdpa_kernel(backend):
            seconds = timed(
                lambda: torch.nn.functional.scaled_dot_product_attention(
                    q, k, v, is_causal=True, enable_gqa=True
                )
            )
        say(
            f"torch {backend.name} D={head_dim}: {seconds * 1e6:.1f} us {problem.work() / seconds / 1e12:.0f} TFLOP/s"
        )


def stored(file: Path, device: str, entries: dict[str, Any]) -> None:
    """Put the entries of `device` into the file, one line each."""
    everything = json.loads(file.read_text())
    everything[device] = entries
    lines = []
    for name, kinds in everything.items():
        if isinstance(kinds, str):  # another device's
            lines.append(f"  {json.dumps(name)}: {json.dumps(kinds)}")
            continue
        lists = [
            f"    {json.dumps(kind)}: [\n      "
            + ",\n      ".join(json.dumps(entry) for entry in kinds[kind])
            + "\n    ]"
            for kind in kinds
        ]
        lines.append(f"  {json.dumps(name)}: {{\n" + ",\n".join(lists) + "\n  }")
    file.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def main(arguments: Sequence[str]) -> int:
    """Search, print, and write where asked."""
    parser = argparse.ArgumentParser(description="Search the shapes of the attention kernels.")
    parser.add_argument("--write", action="store_true", help="store the best for this device")
    parser.add_argument("--out", type=Path, help="every measurement, as JSON")
    parser.add_argument("--head-dims", type=int, nargs="*", default=HEAD_DIMS)
    options = parser.parse_args(arguments)

    def say(line: str) -> None:
        print(line, flush=True)

    found = search(options.head_dims, say)
    for head_dim in options.head_dims:
        if head_dim <= 128:
            torch_prefill(head_dim, say)
    if options.out:
        options.out.write_text(json.dumps(found))
    if options.write:
        stored(configs.FILE, found["device"], found["entries"])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
