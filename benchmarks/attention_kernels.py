"""Searches the shapes of the attention kernels' launches on this device, and writes them where the kernels find them.

    rollout bench gpu attention-kernels [--write] [--out results.json]

Every candidate is compiled first, several at a time; then each is timed as a CUDA graph over pools that exceed the
cache. Decodes are given in bytes of keys and values per second (each sequence's own counted once, shared prefixes once
per group), prefills in floating-point operations per second, beside torch's own attention. With --write,
`kernels/attention_configs.json` gets the best entries under the device's name; those for heads that were not searched
stay.

Of groups of query heads, four to a KV head try all candidates, and the others the best three of these. 16-bit types are
searched; float32 is for comparisons, and keeps the default entries. In deterministic entries the keys of a tile are
given, because decode, shared prefixes and prefill have to agree on them.

--tiny runs all of it on little data, in triton's interpreter where there is no GPU: the search, not its results, is
tried then.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from rollout_kernels import attention_configs as configs
from rollout_kernels import paged_decode as decode
from rollout_kernels import paged_prefill as prefill
from rollout_kernels import shared_prefix_decode as shared
from rollout_kernels import shared_prefixes as host

from .attention_problems import GROUP, GROUPS, HEAD_DIMS, Config, Problem, Search, searches

_MAX_LEN = 1024


class Run:
    """A problem's tensors on the device, and its kernel as something to call."""

    def __init__(self, problem: Problem, num_pools: int, device: torch.device) -> None:
        self.problem = problem
        self.device = device
        torch.manual_seed(0)
        tables, num_blocks = _tables(problem)
        width = -(-_MAX_LEN * 2 // problem.block_size)
        padded = [[*table, *[0] * (width - len(table))] for table in tables]
        self.tables = torch.tensor(padded, dtype=torch.int32, device=device)
        self.seq_lens = torch.tensor(problem.lengths, dtype=torch.int32, device=device)
        shape = (num_blocks, problem.block_size, 2, problem.kv_heads, problem.head_dim)
        self.pools = [
            torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(num_pools)
        ]
        batch, heads = len(problem.lengths), problem.group * problem.kv_heads
        rows = sum(problem.lengths) if problem.kind == "prefill" else batch
        self.q = torch.randn((rows, heads, problem.head_dim), device=device, dtype=torch.bfloat16)
        self.out = torch.empty_like(self.q)
        starts = [sum(problem.lengths[:n]) for n in range(batch + 1)]
        self.starts = torch.tensor(starts, dtype=torch.int32, device=device)
        sizes = {"num_heads": heads, "num_kv_heads": problem.kv_heads, "head_dim": problem.head_dim}
        self.workspace = decode.DecodeWorkspace.allocate(max_batch=batch, **sizes, device=device)
        self.state = shared.SharedState.allocate(max_batch=batch, **sizes, device=device)
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
            prefix = config if problem.kind == "shared" else self._stored_shared()
            tiles = self._shared_prefixes(prefix)
            after = None if problem.kind == "shared" else config

            def launch(pool: torch.Tensor) -> None:
                shared.shared_prefix_decode(
                    q, pool, self.tables, self.seq_lens, out,
                    shared=tiles, workspace=self.workspace, state=self.state,
                    max_len=_MAX_LEN, prefix_config=prefix, config=after, **common,
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
        buffer = torch.tensor(numbers, dtype=torch.int32, device=self.device)
        return host.SharedPrefixes.views(buffer, batch)

    def _stored_shared(self) -> configs.SharedConfig:
        problem = self.problem
        return configs.shared_config(
            self.device, head_dim=problem.head_dim, group=problem.group, dtype=torch.bfloat16
        )


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


def timed(call: Callable[[], Any], device: torch.device, repetitions: int = 9) -> float:
    """Median seconds of a replay of `call` as a CUDA graph; on a CPU of one call."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
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


def compiled(problem: Problem, config: Config, device: torch.device) -> str | None:
    """Compile a candidate's kernels into triton's cache; None, or why it cannot be."""
    try:
        Run(problem.small(), 1, device).call(config)()
        torch.cuda.synchronize()
    except Exception as error:
        return repr(error)[:200]
    return None


class Timings:
    """Every candidate's time for every search."""

    def __init__(self, device: torch.device, say: Callable[[str], None]) -> None:
        self.device = device
        self.rows: list[dict[str, Any]] = []
        """What was measured."""
        self._say = say

    def take(self, wanted: Sequence[Search]) -> list[list[Config]]:
        """For each search its candidates, the fastest first; those that cannot be compiled are left out."""
        jobs = [(each.problem, config) for each in wanted for config in each.candidates]
        failed: dict[tuple[Problem, Config], str | None] = dict.fromkeys(jobs)
        if self.device.type == "cuda":
            workers = min(15, max(1, (os.cpu_count() or 2) - 1))
            with ThreadPoolExecutor(
                workers
            ) as pool:  # Most of the compiler works without Python's lock.
                verdicts = pool.map(lambda job: compiled(job[0], job[1], self.device), jobs)
                failed = dict(zip(jobs, verdicts, strict=True))
        return [self._ranked(each, failed) for each in wanted]

    def _ranked(
        self, each: Search, failed: dict[tuple[Problem, Config], str | None]
    ) -> list[Config]:
        problem, work = each.problem, each.problem.work()
        pools = 1 if problem.kind == "prefill" else min(16, math.ceil(5e8 / work) + 2)
        run = Run(problem, pools if self.device.type == "cuda" else 1, self.device)
        timings: list[tuple[float, Config]] = []
        for config in each.candidates:
            why = failed[problem, config]
            seconds = math.inf
            if why is None:
                seconds = timed(run.call(config), self.device) / len(run.pools)
                timings.append((seconds, config))
            row = {"entry": each.name, **asdict(problem), **asdict(config)}
            del row["lengths"]
            row |= {"seconds": None if why else seconds, "rate": work / seconds, "error": why}
            self.rows.append(row)
        timings.sort(key=lambda timing: timing[0])
        seconds, best = timings[0]
        unit = "TFLOP/s" if problem.kind == "prefill" else "GB/s"
        rate = work / seconds / (1e12 if problem.kind == "prefill" else 1e9)
        label = f"{each.name} D={problem.head_dim} G={problem.group} N={len(problem.lengths)} S={problem.block_size}"
        self._say(f"{label:52} {seconds * 1e6:9.1f} us {rate:7.0f} {unit:8} {asdict(best)}")
        return [config for _, config in timings]


def search(
    head_dims: Sequence[int],
    groups: Sequence[int],
    say: Callable[[str], None],
    *,
    device: torch.device,
    tiny: bool = False,
) -> dict[str, Any]:
    """The entries of this device, and every measurement."""
    timings = Timings(device, say)
    first = searches(head_dims, GROUP, tiny)
    ranked = timings.take(first)
    best = {GROUP: [candidates[0] for candidates in ranked]}
    others = [group for group in groups if group != GROUP]
    again = [
        replace(each, candidates=tuple(candidates[:3]))
        for group in others
        for each, candidates in zip(searches(head_dims, group, tiny), ranked, strict=True)
    ]
    found = [candidates[0] for candidates in timings.take(again)]
    for n, group in enumerate(others):
        best[group] = found[n * len(first) : (n + 1) * len(first)]
    entries: dict[str, list[dict[str, Any]]] = {}
    for n, each in enumerate(first):
        entries.setdefault(each.name, []).extend(
            entries_of(each, {group: best[group][n] for group in sorted(best)})
        )
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {"device": name, "entries": entries, "rows": timings.rows}


def entries_of(each: Search, best: dict[int, Config]) -> list[dict[str, Any]]:
    """One entry for each run of groups, in ascending order, that have the same best candidate."""
    found: list[dict[str, Any]] = []
    groups = list(best)
    for group, after in zip(groups, [*groups[1:], None], strict=True):
        if after is not None and best[after] == best[group]:
            continue
        chosen = {name: value for name, value in asdict(best[group]).items() if value}
        if each.problem.deterministic:  # nothing is split
            chosen.pop("split_keys", None)
            chosen.pop("programs", None)
        limit = {} if after is None else {"max_group": group}
        found.append({**dict(each.limits), **limit, **chosen})
    return found


def torch_prefill(head_dim: int, say: Callable[[str], None]) -> None:
    """What torch's own attention takes for the same prompts, contiguous."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    problem = Problem(kind="prefill", head_dim=head_dim, lengths=(2048,) * 8)
    shape = (8, GROUP * problem.kv_heads, 2048, head_dim)
    q, k, v = (
        torch.randn((8, heads, *shape[2:]), device="cuda", dtype=torch.bfloat16)
        for heads in (shape[1], problem.kv_heads, problem.kv_heads)
    )
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        with sdpa_kernel(backend):
            seconds = timed(
                lambda: torch.nn.functional.scaled_dot_product_attention(
                    q, k, v, is_causal=True, enable_gqa=True
                ),
                q.device,
            )
        say(
            f"torch {backend.name} D={head_dim}: {seconds * 1e6:.1f} us {problem.work() / seconds / 1e12:.0f} TFLOP/s"
        )


def stored(file: Path, device: str, entries: dict[str, Any]) -> None:
    """Put the entries of `device` into the file, one line each; those for other sizes of heads stay."""
    everything = json.loads(file.read_text())
    before = everything.get(device, {})
    if isinstance(before, str):
        before = everything[before]
    searched = {entry["max_head_dim"] for listed in entries.values() for entry in listed}
    for kind, listed in before.items():
        kept = [entry for entry in listed if entry.get("max_head_dim") not in searched]
        entries[kind] = sorted(
            [*entries.get(kind, []), *kept], key=lambda entry: entry.get("max_head_dim", math.inf)
        )
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
    parser.add_argument("--groups", type=int, nargs="*", default=GROUPS)
    parser.add_argument("--tiny", action="store_true", help="little data, to try the search itself")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.write and (device.type != "cuda" or options.tiny):
        parser.error("--write: got no search on a GPU, expected one; leave out --tiny, or --write")

    def say(line: str) -> None:
        print(line, flush=True)

    found = search(options.head_dims, options.groups, say, device=device, tiny=options.tiny)
    for head_dim in options.head_dims:
        if head_dim <= 128 and device.type == "cuda" and not options.tiny:
            torch_prefill(head_dim, say)
    if options.out:
        options.out.write_text(json.dumps(found))
    if options.write:
        stored(configs.FILE, found["device"], found["entries"])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
