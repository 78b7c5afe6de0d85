"""What the user sees while the demo runs."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from ..grpo.records import StepRecord

#: Without a terminal there is no bar; a line every so many steps instead.
STEPS_PER_LINE = 10


class StepListener(Protocol):
    """Told about each step of a phase."""

    def __call__(self, record: StepRecord, heldout_pass_rate: float | None) -> None: ...


class Screen:
    """Start-up lines, one progress bar per phase, and the table at the end."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()
        self._started = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Since this object was made."""
        return time.perf_counter() - self._started

    def say(self, text: str) -> None:
        """One line about what is done."""
        self.console.print(
            f"[dim]{self.seconds:6.1f} s[/dim]  {text}", highlight=False, soft_wrap=True
        )

    @contextmanager
    def phase(self, title: str, steps: int) -> Iterator[StepListener]:
        """A progress bar of `steps` with the last numbers below; call what it yields after each step."""
        progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        )
        task = progress.add_task(title, total=steps)
        below = Text(style="dim")
        live = self.console.is_terminal
        count = 0

        def listen(record: StepRecord, heldout_pass_rate: float | None) -> None:
            nonlocal count
            count += 1
            numbers = _numbers(record)
            below.plain = numbers
            progress.advance(task)
            if not live and (count % STEPS_PER_LINE == 0 or count == steps):
                held = "" if heldout_pass_rate is None else f"  held-out {heldout_pass_rate:.2f}"
                self.say(f"{title} {count:>4}/{steps}  {numbers}{held}")

        if not live:
            yield listen
            return
        with Live(Group(progress, below), console=self.console, refresh_per_second=8):
            yield listen

    def finish(self, summary: Mapping[str, Any], folder: Path, pictures: list[Path]) -> None:
        """The summary and where to look."""
        table = Table(
            show_header=False, title="result", title_justify="left", box=None, padding=(0, 2)
        )
        for label, value in summary_lines(summary):
            table.add_row(f"[dim]{label}[/dim]", value)
        self.console.print()
        self.console.print(table)
        self.console.print("\nlook at", style="bold")
        for path in (
            folder / "report.html",
            *pictures,
            folder / "summary.json",
            folder / "metrics.jsonl",
        ):
            self.console.print(f"  {path}", highlight=False, soft_wrap=True)


def summary_lines(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The summary in words, for the screen and for the report."""
    control = "not run"
    if summary["control_pass_rate_after"] is not None:
        control = (
            f"{summary['control_pass_rate_before']:.2f} → {summary['control_pass_rate_after']:.2f} "
            f"in {summary['control_steps']} steps"
        )
    return [
        (
            "pass rate, held-out prompts",
            f"{summary['pass_rate_before']:.2f} → {summary['pass_rate_after']:.2f} in {summary['steps']} steps",
        ),
        ("the same, weights never synced", control),
        *_gaps(summary),
        ("weight syncs", f"{summary['num_syncs']}, now version {summary['version']}"),
        ("one sync, p50 / p99", _ms(summary["sync_s_p50"], summary["sync_s_p99"])),
        ("of that generation stood still", _ms(summary["pause_s_p50"], summary["pause_s_p99"])),
        ("tokens per second, whole steps", f"{summary['tokens_per_s_p50']:,.0f}"),
        (
            "completions of several versions",
            f"up to {summary['mixed_fraction_max']:.0%} of a batch",
        ),
        ("seconds, everything", f"{summary['seconds']:.0f}"),
    ]


def _gaps(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The promise is about the same weights; what earlier ones sampled is another number."""
    every, own = summary["logprob_gap_max"], summary["logprob_gap_own_max"]
    if own == every:
        return [("log-probability gap, largest", f"{every:.1e}")]
    return [
        (
            "log-probability gap, trainer's own version",
            "no whole completion of it" if own is None else f"{own:.1e}",
        ),
        ("the same, also earlier versions", f"{every:.1e}, which importance weights correct for"),
    ]


def _ms(first: float, second: float) -> str:
    return f"{first * 1e3:.1f} / {second * 1e3:.1f} ms"


def _numbers(record: StepRecord) -> str:
    text = (
        f"reward {record.reward:.2f}  pass {record.pass_rate:.2f}  {record.tokens_per_s:,.0f} tok/s"
    )
    if record.syncs:
        last = record.syncs[-1]
        text += f"  sync {last.sync_s * 1e3:.1f} ms  pause {last.pause_s * 1e3:.1f} ms"
    return text
