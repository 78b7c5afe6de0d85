"""`rollout info`: what the engine makes of a checkpoint and of the settings, without loading a single weight."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ..config import ResolvedConfig
from ..errors import ConfigError
from ..settings import load_settings
from .generate import GenerateSettings
from .options import ConfigFile, Overrides, as_overrides

EPILOG = """[bold]Examples[/bold]

  rollout info PATH

  rollout info PATH --set engine.dtype=float32 --set engine.context_length=4096

  rollout info PATH --memory 80e9 --set engine.tp_size=2

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
    memory: Annotated[
        float | None,
        typer.Option(
            metavar="BYTES",
            help="Imagine a GPU with so many bytes free (80e9: 80 GB) instead of this machine. A real one is measured "
            "at the start; this one gives 85 % to weights and KV cache, or engine.mem_fraction_static.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, tensors included.")] = False,
) -> None:
    """Show a checkpoint's options, its tensors, the resolved configuration of an engine for it, and what fits.

    The settings are those of `rollout generate`; "auto" and "choose for me" are resolved for this machine, or for the
    GPU that --memory imagines.
    """
    if memory is not None and not 1e4 <= memory < 1e15:
        raise ConfigError(
            f"--memory: got {memory:g}, expected the free bytes of a GPU; write 80e9 for 80 GB"
        )
    path = as_overrides({"engine.model_path": str(model)})
    settings = load_settings(GenerateSettings, config, [*(overrides or ()), *path])
    facts = checkpoint_facts(settings, memory)
    if as_json:
        typer.echo(json.dumps(facts, indent=2, default=str))
        return
    where = "this machine" if memory is None else f"an imagined GPU with {_size(int(memory))} free"
    if settings.engine.seed is None:
        facts["engine"]["seed"] = "another one at every start"
    for part in ("model", "engine", "memory of each rank"):
        typer.secho(part if part == "model" else f"{part}, on {where}", bold=True)
        width = max(len(key) for key in facts[part])
        for key, value in facts[part].items():
            typer.echo(f"  {key:<{width}}  {_shown(key, value)}")
    if tensors:
        typer.secho("tensors", bold=True)
        for name, shape in facts["tensors"].items():
            typer.echo(f"  {name}  {list(shape)}")


def checkpoint_facts(settings: GenerateSettings, memory: float | None = None) -> dict[str, Any]:
    """The model's options and sizes, the engine's resolved configuration, what fits, and the shape of every tensor.

    memory: free bytes of the GPU that is imagined; None: this machine as it is.
    """
    import torch

    from ..engine.loop.build import resolve
    from ..engine.loop.checks import DTYPES, check_config
    from ..engine.loop.ranks import RankSpec, device_of
    from ..models.build import build_model
    from ..models.model_config import ModelConfig

    check_config(settings.engine)
    model_config = ModelConfig.from_folder(settings.engine.model_path)
    if memory is None:
        device = device_of(RankSpec(), settings.engine.device)
        settled = resolve(settings.engine, model_config, device)
    else:
        settled = resolve(settings.engine, model_config, "cuda", int(memory))
    resolved = _fields(settled)
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
        "memory of each rank": {
            "weight_bytes": sum(meta.num_bytes for meta in metas) // settings.engine.tp_size,
            **what_fits(settled),
        },
        "tensors": {meta.name: tuple(meta.shape) for meta in metas},
    }


LENGTHS = (1024, 4096, 16384, 65536)
"""Tokens of a request for which it is said how many run at a time."""


def what_fits(resolved: ResolvedConfig) -> dict[str, Any]:
    """Bytes of the KV pool on one rank, and how many requests of which length run at a time, prompt and output."""
    tokens = resolved.num_blocks * resolved.block_size
    lengths = [*(n for n in LENGTHS if n < resolved.context_length), resolved.context_length]
    return {
        "kv_cache_bytes": resolved.kv_cache_bytes,
        "kv_bytes_per_token": resolved.kv_cache_bytes // tokens,
        "kv_tokens": tokens,
        **{
            f"requests of {n:,} tokens": min(
                resolved.num_blocks // -(-n // resolved.block_size),
                resolved.user.max_running_requests,
            )
            for n in lengths
        },
    }


def _fields(settings: Any) -> dict[str, Any]:
    return {item.name: getattr(settings, item.name) for item in dataclasses.fields(settings)}


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.2f} MB"


def _shown(key: str, value: Any) -> str:
    if key == "sliding_windows":
        full = {"None": "full attention"}
        return ", ".join(f"{full.get(w, w)} in {count} layers" for w, count in value.items())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return ", ".join(f"{name} {item}" for name, item in _fields(value).items())
    if key.endswith("_bytes") and isinstance(value, int):
        return f"{value:,} ({_size(value)})"
    if key.startswith("requests of "):
        return f"{value:,} at once"
    if key == "seed":
        return str(value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
