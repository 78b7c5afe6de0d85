"""Times the kernels around attention and matrix products: norms, rotary embedding, gate, and sampling.

    python -m rollout_benchmarks.decode_kernels [--out results.json]

Each is timed as a CUDA graph of launches over tensors that together exceed the cache, beside its floor: bytes that must
move over the device's measured rate of reading. Layers have the shapes of Qwen3-0.6B and Qwen3-8B in bfloat16; sampling
has 151,936 tokens, with logits of two kinds: `peaked`, where a token's probability falls with its rank to the power of
1.6, and `flat`, normal with a deviation of 3.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

from rollout_kernels import fused_norm, qk_norm_rope, silu_mul, token_logprobs
from rollout_kernels.logit_edits import LogitEdits
from rollout_kernels.logit_filters import SamplingFilters
from rollout_kernels.logit_stats import compute_stats
from rollout_kernels.sampling import SampledTokens, SamplingRows, SamplingScratch, sample

VOCAB = 151_936
TOKENS = (1, 8, 64, 256, 8192)
ROWS = (1, 8, 64, 256)
SHAPES = {"0.6B": (1024, 16, 8, 128, 3072), "8B": (4096, 32, 8, 128, 12288)}
"""Hidden size, query heads, KV heads, head size, feed-forward width."""
DTYPE = torch.bfloat16
DEVICE = torch.device("cuda")
_CACHE_BYTES = 120 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """One row of the table."""

    name: str
    """What ran."""
    size: int
    """Tokens, or rows of logits."""
    us: float
    """Microseconds per call, the median of replays."""
    num_bytes: int
    """What must move."""


class Copies:
    """A tensor and copies of it, taken in turn; so many that they exceed the cache, but at most eight."""

    def __init__(self, tensor: torch.Tensor) -> None:
        num = min(_CACHE_BYTES // tensor.nbytes + 1, 8)
        self._turns = cycle([tensor, *(tensor.clone() for _ in range(num - 1))])

    def next(self) -> torch.Tensor:
        return next(self._turns)


def time_us(
    function: Callable[..., object], *args: Any, repeats: int = 20, **options: Any
) -> float:
    """Microseconds per call in a CUDA graph of `repeats` calls, the median of nine replays. Each call gets the next of
    `Copies`."""

    def call() -> None:
        function(*(arg.next() if isinstance(arg, Copies) else arg for arg in args), **options)

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            call()
    times = []
    for _ in range(11):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / repeats)
    return sorted(times[2:])[4]


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE).to(DTYPE)


def layer_timings() -> Iterator[Timing]:
    for name, (hidden, heads, kv_heads, head_dim, width) in SHAPES.items():
        weight = normal(hidden)
        norms = qk_norm_rope.HeadNorms(query=normal(head_dim), key=normal(head_dim), eps=1e-6)
        frequencies = 1e6 ** (-torch.arange(0, head_dim, 2, device=DEVICE) / head_dim)
        table = qk_norm_rope.rotary_table(frequencies, 4096, DTYPE)
        for size in TOKENS:
            residual, x, out = (Copies(normal(size, hidden)) for _ in range(3))
            us = time_us(fused_norm.add_rms_norm, residual, x, weight, 1e-6, out)
            yield Timing(name=f"{name} add and norm", size=size, us=us, num_bytes=8 * size * hidden)
            fused, gated = Copies(normal(size, 2 * width)), Copies(normal(size, width))
            us = time_us(silu_mul.silu_mul, fused, gated)
            yield Timing(name=f"{name} gate", size=size, us=us, num_bytes=6 * size * width)
            features = (heads + 2 * kv_heads) * head_dim
            pool = normal(size // 16 + 1, 16, 2, kv_heads, head_dim)
            positions = torch.randint(4096, (size,), device=DEVICE)
            slots = torch.randperm(16 * len(pool), device=DEVICE)[:size]
            us = time_us(
                qk_norm_rope.rotate_and_store,
                Copies(normal(size, features)),
                pool,
                table,
                positions,
                slots,
                norms=norms,
            )
            num_bytes = size * (4 * features + 2 * head_dim)
            yield Timing(name=f"{name} rotate and store", size=size, us=us, num_bytes=num_bytes)


def full(num_rows: int, value: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full((num_rows,), value, dtype=dtype, device=DEVICE)


def logits_of(num_rows: int, kind: str) -> torch.Tensor:
    noise = torch.randn(num_rows, VOCAB, device=DEVICE)
    if kind == "flat":
        return (3 * noise).to(DTYPE)
    ranks = torch.rand(num_rows, VOCAB, device=DEVICE).argsort(1)
    return (14 - 1.6 * (ranks + 1).log() + 0.5 * noise).to(DTYPE)


def filters_of(num_rows: int, k: int = 0, p: float = 1.0, min_p: float = 0.0) -> SamplingFilters:
    return SamplingFilters(
        top_k=full(num_rows, k, torch.int32), top_p=full(num_rows, p), min_p=full(num_rows, min_p)
    )


def edits_of(num_rows: int, *, penalties: bool = False, num_biases: int = 0) -> LogitEdits:
    tables = torch.arange(num_rows, device=DEVICE) if penalties else full(num_rows, -1)
    return LogitEdits(
        counts=(torch.rand(num_rows, VOCAB, device=DEVICE) < 0.003).to(torch.int16),
        tables=tables.int(),
        repetition=full(num_rows, 1.1),
        frequency=full(num_rows, 0.1),
        presence=full(num_rows, 0.1),
        bias_ids=torch.randint(VOCAB, (num_rows, 300), dtype=torch.int32, device=DEVICE),
        biases=torch.randn(num_rows, 300, device=DEVICE),
        num_biases=full(num_rows, num_biases, torch.int32),
        end_ids=full(num_rows, 7, torch.int32).unsqueeze(1),
        num_ends=full(num_rows, 1, torch.int32),
        min_tokens=full(num_rows, 0, torch.int32),
    )


def sampling_timings() -> Iterator[Timing]:
    for size in ROWS:
        rows = SamplingRows(
            seeds=torch.randint(2**62, (size,), device=DEVICE),
            positions=torch.randint(1000, (size,), device=DEVICE),
            temperature=full(size, 0.8),
            greedy=full(size, 0, torch.bool),
        )
        scratch = SamplingScratch.allocate(size, VOCAB, DEVICE)
        out = SampledTokens.allocate(size, DEVICE)
        once, twice = 2 * size * VOCAB, 4 * size * VOCAB
        peaked = Copies(logits_of(size, "peaked"))
        cases = {
            "draw": (peaked, None, None, once),
            "draw, no row filters": (peaked, None, filters_of(size), once),
            "draw, min_p 0.05": (peaked, None, filters_of(size, min_p=0.05), once),
            "draw, top_p 0.95": (peaked, None, filters_of(size, p=0.95), once),
            "draw, top_k 50": (peaked, None, filters_of(size, k=50), once),
            "draw, top_k 50, top_p 0.9": (peaked, None, filters_of(size, k=50, p=0.9), once),
            "draw, no row edits": (peaked, edits_of(size), None, once),
            "draw, penalties": (peaked, edits_of(size, penalties=True), None, twice),
            "draw, 300 biases": (peaked, edits_of(size, num_biases=300), None, once),
        }
        flat = Copies(logits_of(size, "flat"))
        cases["draw, top_p 0.9, flat"] = (flat, None, filters_of(size, p=0.9), once)
        cases["draw, top_k 1000, flat"] = (flat, None, filters_of(size, k=1000), once)
        for name, (logits, edits, filters, num_bytes) in cases.items():
            options: dict[str, Any] = {"edits": edits, "filters": filters}
            us = time_us(sample, logits, rows, scratch, out, repeats=10, **options)
            yield Timing(name=name, size=size, us=us, num_bytes=num_bytes)
        yield from _logprob_timings(peaked, rows, scratch)


def _logprob_timings(
    logits: Copies, rows: SamplingRows, scratch: SamplingScratch
) -> Iterator[Timing]:
    temperature, stats = rows.temperature, scratch.stats
    size = len(temperature)
    targets, logprobs = torch.zeros(size, dtype=torch.int64, device=DEVICE), full(size, 0)

    def given(here: torch.Tensor) -> None:
        compute_stats(here, temperature, stats)
        token_logprobs.gather_logprobs(here, temperature, targets, stats, logprobs)

    us = time_us(given, logits, repeats=10)
    yield Timing(name="given tokens", size=size, us=us, num_bytes=2 * size * VOCAB)
    for num in (5, 20):
        ids = torch.zeros(size, num, dtype=torch.int64, device=DEVICE)
        values, wanted = torch.zeros(size, num, device=DEVICE), full(size, num, torch.int32)
        top = token_logprobs.top_logprobs
        us = time_us(top, logits, temperature, wanted, stats, ids, values, repeats=10)
        yield Timing(name=f"top {num} after a draw", size=size, us=us, num_bytes=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="where to write the numbers as JSON")
    path: Path | None = parser.parse_args().out
    big = torch.empty(1 << 28, device=DEVICE)
    rate = big.nbytes / time_us(torch.sum, big, repeats=5)
    del big
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, reads {rate / 1e3:.0f} GB/s")
    timings = []
    for timing in (*layer_timings(), *sampling_timings()):
        floor = timing.num_bytes / rate
        print(f"{timing.name:32s} {timing.size:5d} {timing.us:9.2f} us   floor {floor:7.2f} us")
        timings.append({**asdict(timing), "floor_us": floor})
    if path is not None:
        result = {"device": torch.cuda.get_device_name(), "bytes_per_us": rate, "rows": timings}
        path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
