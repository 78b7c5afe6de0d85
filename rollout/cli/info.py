"""`rollout info`: what the engine makes of a checkpoint, without loading a single weight."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

EPILOG = """[bold]Examples[/bold]

  rollout info PATH                 family, sizes, memory and tensor names

  rollout info PATH --dtype float32

  rollout info PATH --tensors       every tensor that a trainer sends, with its shape

  rollout info PATH --json          for programs
"""


def info(
    model: Annotated[Path, typer.Argument(help="Folder of a Hugging Face checkpoint.")],
    dtype: Annotated[
        str, typer.Option(help="Dtype to count memory in; auto: the checkpoint's.")
    ] = "auto",
    tensors: Annotated[
        bool, typer.Option("--tensors", help="List the tensors that an update may bring.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what the engine makes of a checkpoint: its options, its memory, its tensors."""
    facts = model_facts(model, dtype)
    names = facts.pop("tensors")
    if as_json:
        typer.echo(json.dumps({**facts, "tensors": names}, indent=2, default=str))
        return
    width = max(len(key) for key in facts)
    for key, value in facts.items():
        typer.echo(f"{key:<{width}}  {_shown(key, value)}")
    if tensors:
        typer.echo()
        for name, shape in names.items():
            typer.echo(f"{name}  {list(shape)}")


def model_facts(path: Path, dtype: str) -> dict[str, Any]:
    """Everything to say about the checkpoint at `path`; the model is built without storage."""
    import torch

    from ..errors import ConfigError
    from ..models.build import build_model
    from ..models.model_config import ModelConfig

    config = ModelConfig.from_folder(path)
    dtype_name = (config.dtype or "bfloat16") if dtype == "auto" else dtype
    torch_dtype = getattr(torch, dtype_name, None)
    if not isinstance(torch_dtype, torch.dtype):
        raise ConfigError(
            f"--dtype: got {dtype!r}, expected auto or a torch dtype such as bfloat16 or float32"
        )
    model = build_model(config, torch_dtype, "meta")
    metas = model.weight_map.metas()
    options = {key: getattr(config, key) for key in config.__dataclass_fields__}
    windows = options.pop("sliding_windows")
    kv_heads = config.num_kv_heads * config.head_dim * config.num_layers
    return {
        "path": str(path),
        **options,
        "sliding_windows": {str(w): windows.count(w) for w in dict.fromkeys(windows)},
        "dtype": dtype_name,
        "num_tensors": len(metas),
        "num_parameters": sum(meta.num_elements for meta in metas),
        "parameter_bytes": sum(meta.num_bytes for meta in metas),
        "kv_bytes_per_token": 2 * kv_heads * torch_dtype.itemsize,
        "tensors": {meta.name: tuple(meta.shape) for meta in metas},
    }


def _shown(key: str, value: Any) -> str:
    if key == "sliding_windows":
        full = {"None": "full attention"}
        return ", ".join(f"{full.get(w, w)} in {count} layers" for w, count in value.items())
    if key == "parameter_bytes":
        return f"{value:,} ({value / 1e9:.2f} GB)"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
