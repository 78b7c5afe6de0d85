"""Result files of benchmarks: what was measured, where, at which commit, and next to which floor.

`benchmarks/readme_table.py` makes the README's table of numbers from the `headline` rows of such files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import math
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from rollout.errors import ConfigError

from .screen import Screen

HEADLINE = ("what", "measured", "floor", "of the floor", "target", "usual way")
"""Columns of the table that is shown last."""

Table = tuple[str, tuple[str, ...], list[tuple[str, ...]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Headline:
    """One row for people; all of it is text as it is to be read."""

    what: str
    """What was measured, with its size."""
    measured: str
    """The number with its unit."""
    floor: str = ""
    """What the machine allows for it, with its unit; empty: not known."""
    ratio: str = ""
    """The first over the second."""
    target: str = ""
    """What is promised, such as "at most 3" (of the ratio); empty: nothing."""
    met: bool | None = None
    """Whether the target is met; None: there is none."""
    peer: str = ""
    """What the usual way takes for the same, with its unit and its name; empty: not measured."""

    @property
    def verdict(self) -> str:
        """The target, and whether it is met."""
        return "" if self.met is None else f"{self.target}: {'met' if self.met else 'missed'}"


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
    software: dict[str, str] = field(default_factory=lambda: software())
    """Versions of what it ran on."""
    load: tuple[float, ...] = field(default_factory=os.getloadavg)
    """Load averages of the machine at the end (1, 5 and 15 minutes): above 1 per CPU, others were measured too."""
    tables: tuple[Table, ...] = ()
    """What the screen shows besides: title, columns, rows."""
    has_picture: bool = False
    """`figures.figure_of` knows how to draw it."""
    quick: bool = False
    """Sizes were tiny: nothing is held against targets."""

    def at_tiny_sizes(self) -> BenchResult:
        """The same without targets, which are for the sizes that the benchmark is made for."""
        rows = tuple(dataclasses.replace(row, target="", met=None) for row in self.headline)
        return dataclasses.replace(self, headline=rows, quick=True)


def summary(values: Sequence[float]) -> dict[str, float]:
    """Percentiles of a series: `num, min, p10, p50, p90, p99, max, mean`."""
    ordered = sorted(values)
    if not ordered:
        raise ValueError("cannot summarise a series: got no values, expected at least one")

    def at(share: float) -> float:
        """Nearest rank, so that p99 of a short series is a value that occurred."""
        return ordered[math.ceil(share * len(ordered)) - 1]

    return {
        "num": len(ordered),
        "min": ordered[0],
        "p10": at(0.10),
        "p50": statistics.median(ordered),
        "p90": at(0.90),
        "p99": at(0.99),
        "max": ordered[-1],
        "mean": statistics.fmean(ordered),
    }


def default_path(result: BenchResult) -> Path:
    """`benchmarks/results/NAME-DEVICE.json` in the current folder."""
    device = re.sub(r"[^a-z0-9]+", "-", result.device.lower()).strip("-")
    return Path("benchmarks") / "results" / f"{result.benchmark}-{device}.json"


def check_out(path: Path) -> None:
    """`ConfigError` for a result that could not be written or drawn, before anything is measured."""
    if path.is_dir():
        raise ConfigError(
            f"--out: got the folder {str(path)!r}, expected a file; name one in it, such as {path / 'result.json'}"
        )
    blocked = next((parent for parent in path.absolute().parents if parent.exists()), None)
    if blocked is not None and not (blocked.is_dir() and os.access(blocked, os.W_OK)):
        raise ConfigError(
            f"--out: got {str(path)!r}, expected a folder that can be written to; {blocked} cannot"
        )
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(
            "the picture beside the result needs matplotlib, which is not installed; pip install 'rollout-sync[demo]'"
        )


def write_result(path: Path, result: BenchResult) -> list[Path]:
    """Write `result` as JSON, and a picture beside it where there is one; folders are made. Returns the files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = _rounded(dataclasses.asdict(result))
    del content["tables"], content["has_picture"]
    text = json.dumps(content, indent=1) + "\n"
    path.write_text(text, encoding="utf-8")
    if not result.has_picture:
        return [path]
    from .figures import figure_of

    picture = path.with_suffix(".png")
    figure_of(json.loads(text)).savefig(picture)  # as from the file: its keys are text
    return [path, picture]


def show(result: BenchResult, screen: Screen | None = None) -> None:
    """Print the tables: details first, then the headline, and whether the targets are met."""
    screen = screen or Screen()
    for title, columns, rows in result.tables:
        screen.table(title, columns, rows)
    cells = [
        (row.what, row.measured, row.floor, row.ratio, row.verdict, row.peer)
        for row in result.headline
    ]
    used = [i for i in range(len(HEADLINE)) if i < 2 or any(row[i] for row in cells)]
    screen.table(
        f"{result.benchmark} on {result.device}",
        tuple(HEADLINE[i] for i in used),
        [tuple(row[i] for i in used) for row in cells],
    )
    held = [row for row in result.headline if row.met is not None]
    if held:
        missed = [f"{row.what} ({row.target})" for row in held if not row.met]
        words = f"; missed: {'; '.join(missed)}" if missed else ""
        screen.say(f"targets: {len(held) - len(missed)} of {len(held)} met{words}")
    elif result.quick:
        screen.say("tiny sizes: this shows that it works, and is held against no target")


def _rounded(value: Any) -> Any:
    """Numbers with six significant digits, so that files can be read."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


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


def software() -> dict[str, str]:
    """Versions that decide how fast it is."""
    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", "numpy", "pyzmq", "msgspec"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


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
