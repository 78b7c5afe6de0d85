"""`rollout info`: what the engine makes of a checkpoint and of the settings, without loading a single weight."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ..settings import load_settings
from .generate import GenerateSettings
from .options import ConfigFile, Overrides, as_overrides

EPILOG = """[bold]Examples[/bold]

  rollout info PATH

  rollout info PATH --set engine.dtype=float32 --set engine.context_length=4096

  rollout info PATH --tensors

  rollout info PATH --json
"""


def info(
    model: Annotated[Path, typer.Argument(help="Folder of a Hugging Face checkpoint.")],
    config: ConfigFile = None,
    overrides: Overrides = None,
    tensors: Annotated[
        bool, typer.Option("--tensors", help="List the tensors that an update may bring.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, tensors included.")] = False,
) -> None:
    """Show a checkpoint's options, its tensors, and the resolved configuration of an engine for it.

    The settings are those of `rollout generate`; "auto" and "choose for me" are resolved for this machine.
    """
    path = as_overrides({"engine.model_path": str(model)})
    settings = load_settings(GenerateSettings, config, [*(overrides or ()), *path])
    facts = checkpoint_facts(settings)
    if as_json:
        typer.echo(json.dumps(facts, indent=2, default=str))
        return
    for part in ("model", "engine"):
        typer.secho(part, bold=True)
        width = max(len(key) for key in facts[part])
        for key, value in facts[part].items():
            typer.echo(f"  {key:<{width}}  {_shown(key, value)}")
    if tensors:
        typer.secho("tensors", bold=True)
        for name, shape in facts["tensors"].items():
            typer.echo(f"  {name}  {list(shape)}")


def checkpoint_facts(settings: GenerateSettings) -> dict[str, Any]:
    """The model's options and sizes, the engine's resolved configuration, and the shape of every tensor."""
    import torch

    from ..engine.loop.build import resolve
    from ..engine.loop.checks import DTYPES, check_config
    from ..engine.loop.ranks import RankSpec, device_of
    from ..models.build import build_model
    from ..models.model_config import ModelConfig

    check_config(settings.engine)
    model_config = ModelConfig.from_folder(settings.engine.model_path)
    device = device_of(RankSpec(), settings.engine.device)
    resolved = _fields(resolve(settings.engine, model_config, device))
    user = _fields(resolved.pop("user"))
    # On the meta device there is a structure and no storage.
    model = build_model(model_config, DTYPES[resolved["dtype"]], torch.device("meta"))
    metas = model.weight_map.metas()
    options = _fields(model_config)
    windows = options.pop("sliding_windows")
    return {
        "model": {
            **options,
            "sliding_windows": {str(w): windows.count(w) for w in dict.fromkeys(windows)},
            "num_tensors": len(metas),
            "num_parameters": sum(meta.num_elements for meta in metas),
            "parameter_bytes": sum(meta.num_bytes for meta in metas),
        },
        "engine": {**user, **resolved},
        "tensors": {meta.name: tuple(meta.shape) for meta in metas},
    }


def _fields(settings: Any) -> dict[str, Any]:
    return {item.name: getattr(settings, item.name) for item in dataclasses.fields(settings)}


def _shown(key: str, value: Any) -> str:
    if key == "sliding_windows":
        full = {"None": "full attention"}
        return ", ".join(f"{full.get(w, w)} in {count} layers" for w, count in value.items())
    if key.endswith("_bytes") and isinstance(value, int):
        return f"{value:,} ({value / 1e9:.2f} GB)"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
