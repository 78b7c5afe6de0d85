"""Result files of benchmarks: what was measured, where, at which commit, and next to which floor.

`benchmarks/readme_table.py` makes the README's table of numbers from the `headline` rows of such files.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Headline:
    """One row for people; all of it is text as it is to be read."""

    what: str
    """What was measured, with its size."""
    measured: str
    """The number with its unit."""
    floor: str
    """What the machine allows, or what the usual way takes, with its unit."""
    ratio: str
    """The first over the second, or the other way round where more is better."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchResult:
    """One run of one benchmark."""

    benchmark: str
    """Name of the sub-command."""
    config: dict[str, Any]
    """Everything that was chosen: sizes, dtypes, repeats, threads."""
    numbers: dict[str, Any]
    """Everything that was measured; series as `summary` makes them."""
    headline: tuple[Headline, ...]
    """The rows to show first."""
    device: str = field(default_factory=lambda: device_name())
    """Processor or GPU."""
    commit: str = field(default_factory=lambda: commit_id())
    """Commit of the code, with "-dirty" where files differ from it; "unknown" outside a checkout."""


def summary(values: Sequence[float]) -> dict[str, float]:
    """Percentiles of a series: `num, min, p50, p90, p99, max, mean`."""
    ordered = sorted(values)
    if not ordered:
        raise ValueError("cannot summarise a series: got no values, expected at least one")

    def at(share: float) -> float:
        """Nearest rank, so that p99 of a short series is a value that occurred."""
        return ordered[math.ceil(share * len(ordered)) - 1]

    return {
        "num": len(ordered),
        "min": ordered[0],
        "p50": statistics.median(ordered),
        "p90": at(0.90),
        "p99": at(0.99),
        "max": ordered[-1],
        "mean": statistics.fmean(ordered),
    }


def write_result(path: Path, result: BenchResult) -> None:
    """Write `result` as JSON; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dataclasses.asdict(result), indent=2) + "\n", encoding="utf-8")


def show(result: BenchResult) -> None:
    """Print the headline as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table("what", title=f"{result.benchmark} on {result.device}", title_justify="left")
    for column in ("measured", "floor or usual way", "ratio"):
        table.add_column(column, justify="right")
    for row in result.headline:
        table.add_row(row.what, row.measured, row.floor, row.ratio)
    Console().print(table)


def device_name() -> str:
    """The processor's name and how many threads of it we may use."""
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    return f"{name}, {len(os.sched_getaffinity(0))} CPUs"


def commit_id() -> str:
    """Commit of the checkout that this code runs from."""
    here = Path(__file__).parent
    try:
        # `describe` alone would find any repository around an installed package.
        subprocess.run(
            ["git", "ls-files", "--error-unmatch", Path(__file__).name],
            cwd=here,
            check=True,
            capture_output=True,
        )
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=here,
            check=True,
            capture_output=True,
            text=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return described.stdout.strip()
