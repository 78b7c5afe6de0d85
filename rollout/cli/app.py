"""The command group: built-in sub-commands, those of other packages, and how errors are shown.

Sub-commands of packages that come after `rollout` in the order of imports (`demo`), or that are found only
when asked for (`bench`), are entry points of the group `rollout.commands`: a function that typer accepts, with
its examples in `EPILOG` of its module, or a `typer.Typer` with sub-commands of its own. Their modules must be
cheap to import: `rollout --help` loads them all and never torch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import Annotated

import typer

from . import experts, generate, info, serve, tiny, top, version

COMMANDS_GROUP = "rollout.commands"

EPILOG = """[bold]Examples[/bold]

  rollout demo

  rollout demo --mode async --name second --seed 1

  rollout tiny tiny

  rollout generate --model tiny "Once upon a time"

  rollout serve --model PATH

  rollout top ADDRESS

  rollout experts ADDRESS --out experts.png

  rollout bench machine

[bold]Settings[/bold]

  Commands take their settings from a TOML file (--config FILE) and from
  --set KEY=VALUE; an unknown key is an error that names the nearest one.
  ROLLOUT_DEBUG=1 shows the traceback of an error.
"""


def build_app() -> typer.Typer:
    """A new command group with everything that is installed."""
    app = typer.Typer(
        name="rollout",
        help="A rollout engine for RL post-training whose weights change while it runs.",
        epilog=EPILOG,
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_group)
    app.command("experts", epilog=experts.EPILOG)(experts.experts)
    app.command("generate", epilog=generate.EPILOG)(generate.generate)
    app.command("info", epilog=info.EPILOG)(info.info)
    app.command("serve", epilog=serve.EPILOG)(serve.serve)
    app.command("tiny", epilog=tiny.EPILOG)(tiny.tiny)
    app.command("top", epilog=top.EPILOG)(top.top)
    app.command("version")(version.version)
    for entry_point in sorted(entry_points(group=COMMANDS_GROUP), key=lambda entry: entry.name):
        add_command(app, entry_point)
    return app


def add_command(app: typer.Typer, entry_point: EntryPoint) -> None:
    """Add one sub-command by its entry point; one that cannot be imported says so when it is called."""
    try:
        command = entry_point.load()
    except (ImportError, AttributeError) as error:
        app.command(entry_point.name, help=f"[dim]Not available: {error}[/dim]")(
            _unavailable(entry_point, error)
        )
        return
    if isinstance(command, typer.Typer):
        app.add_typer(command, name=entry_point.name)
    else:
        epilog = getattr(sys.modules[command.__module__], "EPILOG", None)
        app.command(entry_point.name, epilog=epilog)(command)


def run(arguments: list[str] | None = None) -> None:
    """Run the command line and exit; errors that we raise on purpose are one line, not a traceback."""
    from weight_sync.errors import SyncError

    from ..errors import RolloutError

    app = build_app()
    try:
        app(arguments)
    except (RolloutError, SyncError) as error:
        if os.environ.get("ROLLOUT_DEBUG"):
            raise
        _show(error)
        sys.exit(1)


def _print_version(asked: bool) -> None:
    if asked:
        from .. import __version__

        typer.echo(f"rollout-sync {__version__}")
        raise typer.Exit


def _group(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and exit.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """A callback makes this a group, however few sub-commands are installed."""


def _show(error: Exception) -> None:
    from rich.console import Console
    from rich.text import Text

    line = Text.assemble(("error: ", "bold red"), str(error) or type(error).__name__)
    Console(stderr=True).print(line, soft_wrap=True)


def _unavailable(entry_point: EntryPoint, error: Exception) -> Callable[[], None]:
    def command() -> None:
        raise typer.BadParameter(
            f"`rollout {entry_point.name}` cannot be loaded from {entry_point.value}: {error}; "
            f"install what it needs, for example with pip install 'rollout-sync[demo]'"
        )

    return command
