"""`rollout version`: what is installed, for a bug report."""

from __future__ import annotations

import json
import platform
from importlib import metadata
from typing import Annotated

import typer

#: Distributions whose versions decide how the engine behaves.
DISTRIBUTIONS = (
    "rollout-sync",
    "torch",
    "transformers",
    "safetensors",
    "pyzmq",
    "msgspec",
    "triton",
)


def version(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print the versions of this package and of what it runs on."""
    versions = {"python": platform.python_version()}
    for name in DISTRIBUTIONS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    versions["machine"] = f"{platform.system()} {platform.release()} {platform.machine()}"
    if as_json:
        typer.echo(json.dumps(versions, indent=2))
        return
    for name, value in versions.items():
        typer.echo(f"{name:<14} {value}")
