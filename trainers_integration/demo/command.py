"""`rollout demo`: train a small model by RL while its rollouts come from an engine that it pushes weights into."""

from __future__ import annotations

from typing import Annotated

import typer

from rollout.cli.options import ConfigFile, Overrides, as_overrides, as_toml, setting_option
from rollout.settings import load_settings

from .config import Algorithm, DemoConfig, GrpoConfig, Mode, ModelConfig, ModelKind

EPILOG = """[bold]Examples[/bold]

  rollout demo

  rollout demo --model moe --name moe

  rollout demo --mode async --name second --seed 1

  rollout demo --algorithm ppo --mode continuous

  rollout demo --config configs/demo.toml --set grpo.learning_rate=3e-4

  rollout demo --steps 20 --set control_steps=0

  rollout demo --print-config > my.toml
"""

AlgorithmOption = Annotated[Algorithm | None, setting_option(DemoConfig, "algorithm")]
ModelOption = Annotated[
    ModelKind | None,
    setting_option(
        ModelConfig, "kind", "--model", text="dense, or a mixture of experts (model.kind)"
    ),
]
ModeOption = Annotated[Mode | None, setting_option(DemoConfig, "mode")]
Steps = Annotated[int | None, setting_option(GrpoConfig, "steps", text="Steps (grpo.steps)")]
Seed = Annotated[int | None, setting_option(DemoConfig, "seed")]
Name = Annotated[str | None, setting_option(DemoConfig, "name")]


def demo(
    algorithm: AlgorithmOption = None,
    model: ModelOption = None,
    mode: ModeOption = None,
    steps: Steps = None,
    seed: Seed = None,
    name: Name = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the settings as TOML and exit.")
    ] = False,
) -> None:
    """Train a small model to sort digits, and see its weights change under running requests.

    The trainer runs in this process, the engine in another; after every step the trainer pushes its weights
    into the engine through shared memory. Takes about two minutes on two cores; runs/NAME/report.html shows
    what happened. Every setting is listed in configs/demo.toml.
    """
    options = {
        "algorithm": algorithm,
        "model.kind": model,
        "mode": mode,
        "grpo.steps": steps,
        "seed": seed,
        "name": name,
    }
    settings = load_settings(DemoConfig, config, [*(overrides or ()), *as_overrides(options)])
    if print_config:
        typer.echo(as_toml(settings))
        return

    from .screen import Screen

    screen = Screen()
    screen.say("start     loading torch and transformers")

    from .run import run_demo

    run_demo(settings, screen)
