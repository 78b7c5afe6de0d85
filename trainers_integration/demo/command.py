"""`rollout demo`: train a small model with GRPO while its rollouts come from an engine that it pushes weights into."""

from __future__ import annotations

from typing import Annotated

from rollout.cli.options import ConfigFile, Overrides, as_overrides, setting_option
from rollout.settings import load_settings

from .config import DemoConfig, GrpoConfig, Mode

ModeOption = Annotated[Mode | None, setting_option(DemoConfig, "mode")]
Steps = Annotated[int | None, setting_option(GrpoConfig, "steps", text="GRPO steps (grpo.steps)")]
Seed = Annotated[int | None, setting_option(DemoConfig, "seed")]
Name = Annotated[str | None, setting_option(DemoConfig, "name")]


def demo(
    mode: ModeOption = None,
    steps: Steps = None,
    seed: Seed = None,
    name: Name = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
) -> None:
    """Train a small model to sort digits, and see its weights change under running requests.

    The trainer runs in this process, the engine in another; after every step the trainer pushes its weights
    into the engine through shared memory. Takes about two minutes on two cores; runs/NAME/report.html shows
    what happened. Every setting is listed in configs/demo.toml.
    """
    options = {"mode": mode, "grpo.steps": steps, "seed": seed, "name": name}
    settings = load_settings(DemoConfig, config, [*(overrides or ()), *as_overrides(options)])

    from .run import run_demo
    from .screen import Screen

    run_demo(settings, Screen())
