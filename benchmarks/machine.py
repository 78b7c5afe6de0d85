"""The floor: how fast this machine copies the bytes of a model from one place in memory to another."""

from __future__ import annotations

import time

import torch

from .results import BenchResult, Headline, summary


def measure_copy(*, num_bytes: int, repeats: int) -> BenchResult:
    """Time plain multi-threaded copies between two buffers whose pages are all there already."""
    if num_bytes < 1 or repeats < 1:
        raise ValueError(
            f"cannot measure a copy: got {num_bytes} bytes and {repeats} repeats, expected at least 1 of each"
        )
    source = torch.zeros(num_bytes, dtype=torch.uint8)
    target = torch.ones(num_bytes, dtype=torch.uint8)
    target.copy_(source)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - start)
    median = summary(seconds)["p50"]
    best = min(seconds)
    return BenchResult(
        benchmark="machine",
        config={
            "num_bytes": num_bytes,
            "repeats": repeats,
            "num_threads": torch.get_num_threads(),
            "torch": torch.__version__,
        },
        numbers={"copy_s": summary(seconds), "copy_bytes_per_s": num_bytes / median},
        headline=(
            Headline(
                what=f"copy of {num_bytes / 1e9:.2f} GB, median of {repeats}",
                measured=f"{median * 1e3:.1f} ms ({num_bytes / median / 1e9:.1f} GB/s)",
                floor=f"{best * 1e3:.1f} ms (fastest)",
                ratio=f"{median / best:.2f}",
            ),
        ),
    )
