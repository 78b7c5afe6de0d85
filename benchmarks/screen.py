"""What the user sees while a benchmark runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

Advance = Callable[[str], None]


class Screen:
    """Lines, progress bars and tables; without a terminal there are lines in place of bars."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()

    def say(self, text: str) -> None:
        """One line about what is done."""
        self.console.print(text, style="dim", highlight=False)

    @contextmanager
    def progress(self, title: str, total: int) -> Iterator[Advance]:
        """A bar of `total` steps; call what it yields after each one, with a few words about it."""
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[note]}[/dim]"),
            console=self.console,
            disable=not self.console.is_terminal,
            transient=True,
        ) as bar:
            task = bar.add_task(title, total=total, note="")

            def advance(note: str) -> None:
                bar.update(task, advance=1, note=note)
                if not self.console.is_terminal and note:
                    self.say(f"{title} {int(bar.tasks[task].completed)}/{total}: {note}")

            yield advance

    def table(self, title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
        """The first column in words, the others right-aligned."""
        table = Table(columns[0], title=title, title_justify="left")
        for column in columns[1:]:
            table.add_column(column, justify="right")
        for row in rows:
            table.add_row(*row)
        self.console.print(table)
