"""A progress bar for the capture of graphs, for people who look at a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[str, int, int], None]
"""What is captured, how many graphs are done, how many there are."""


@contextmanager
def capture_progress() -> Iterator[Progress | None]:
    """A bar on standard error, gone when it is done; None where that is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress as Bar

    with Bar(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("capturing")

        def advance(what: str, done: int, total: int) -> None:
            bar.update(task, description=f"capturing a {what}", completed=done, total=total)

        yield advance
