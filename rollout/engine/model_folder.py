"""A folder for a model that has none: its configuration and tokenizer, and no weights."""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from ..errors import ConfigError


def write_model_folder(model: Any, tokenizer: Any) -> Path:
    """A new private folder with what an engine reads of `model` besides its weights; `ConfigError` if it has no config.

    Whoever calls it removes it, with `remove_model_folder`.
    """
    inner = model
    while not hasattr(inner, "config") and hasattr(inner, "module"):
        inner = inner.module
    config: Any = getattr(inner, "config", None)
    if not hasattr(config, "save_pretrained"):
        raise ConfigError(
            f"model: got {type(model).__name__}, expected a transformers model (with `config`); save other models to a "
            "folder with a config.json, and pass that to Engine with load_format='dummy'"
        )
    folder = Path(tempfile.mkdtemp(prefix="rollout-model-"))
    try:
        kind = type(inner).__name__
        if kind.endswith(("ForSequenceClassification", "ForCausalLM")):
            config = copy.copy(
                config
            )  # Which of both it is, a configuration need not say, nor say rightly.
            config.architectures = [kind]
        config.save_pretrained(folder)
        generation = getattr(inner, "generation_config", None)
        if generation is not None:
            (folder / "generation_config.json").write_text(generation.to_json_string())
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


def remove_model_folder(folder: Path, pid: int) -> None:
    """Remove a folder of `write_model_folder`, in the process that wrote it only: a forked child leaves it alone."""
    if os.getpid() == pid:
        shutil.rmtree(folder, ignore_errors=True)
