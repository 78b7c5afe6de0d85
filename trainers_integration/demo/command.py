"""`rollout demo`: the command-line face of the demo; found through the entry point of that name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rollout.cli.options import ConfigFile, Overrides, as_overrides, as_toml, setting_option
from rollout.settings import load_settings

from .config import DemoConfig, Mode

EPILOG = """[bold]Examples[/bold]

  rollout demo

  rollout demo --mode async --name second --seed 1

  rollout demo --config configs/demo.toml --set grpo.learning_rate=3e-4

  rollout demo --steps 20 --set control_steps=0 --set eval.every=10

  rollout demo --print-config > my.toml

[bold]What it writes[/bold]

  The folder runs/NAME with report.html (open it in a browser), its pictures,
  metrics.jsonl, summary.json and the trained checkpoint.
"""


def demo(
    mode: Annotated[Mode | None, setting_option(DemoConfig, "mode")] = None,
    name: Annotated[str | None, setting_option(DemoConfig, "name")] = None,
    seed: Annotated[int | None, setting_option(DemoConfig, "seed")] = None,
    steps: Annotated[int | None, typer.Option(help="RL steps (grpo.steps).")] = None,
    runs_dir: Annotated[Path | None, setting_option(DemoConfig, "runs_dir")] = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the settings as TOML and exit.")
    ] = False,
) -> None:
    """Train a small model with GRPO while its weights flow into a running engine."""
    options = {
        "mode": mode,
        "name": name,
        "seed": seed,
        "grpo.steps": steps,
        "runs_dir": None if runs_dir is None else str(runs_dir),
    }
    settings = load_settings(DemoConfig, config, [*(overrides or ()), *as_overrides(options)])
    if print_config:
        typer.echo(as_toml(settings))
        return
    from .run import run_demo
    from .screen import Screen

    run_demo(settings, Screen())
