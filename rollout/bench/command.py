"""`rollout bench`: one sub-command per benchmark; found through the entry point of that name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

EPILOG = """[bold]Examples[/bold]

  rollout bench machine

  rollout bench machine --gigabytes 0.5 --out machine.json
"""

app = typer.Typer(
    help="Measure the engine, next to what the machine allows.",
    epilog=EPILOG,
    no_args_is_help=True,
    rich_markup_mode="rich",
)

#: Where a benchmark writes its result file; every benchmark takes this option.
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Write the result as JSON here.")]


@app.callback()
def bench() -> None:
    """A callback keeps this a group while it has few sub-commands."""


@app.command("machine")
def machine(
    gigabytes: Annotated[float, typer.Option(help="Bytes to copy, in units of 1e9.")] = 1.19,
    repeats: Annotated[int, typer.Option(help="Copies to time.")] = 10,
    out: Out = None,
) -> None:
    """How fast this machine copies memory: the floor of every weight update."""
    from .machine import measure_copy
    from .results import show, write_result

    result = measure_copy(num_bytes=int(gigabytes * 1e9), repeats=repeats)
    show(result)
    if out is not None:
        write_result(out, result)
