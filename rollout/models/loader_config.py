"""Where a model's first weights come from, and what every loader is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..errors import CheckpointError
from .decoder import Decoder

LOAD_FORMATS = ("auto", "safetensors", "dummy", "sharded_state")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadConfig:
    """Where a model's first weights come from."""

    load_format: Literal["auto", "safetensors", "dummy", "sharded_state"] = "auto"
    """"auto" is "safetensors"; "dummy" reads no file; "sharded_state" reads what `save_sharded_model` wrote."""
    seed: int = 0
    """Seed of dummy weights."""
    num_threads: int = 4
    """Threads that read, or draw, tensors."""
    pattern: str | None = None
    """Names of the files of "sharded_state", with `{rank}` and `{part}`; None: the usual ones."""


class BaseModelLoader(ABC):
    """Fills the parameters of a model in place; may be called any number of times on the same model."""

    def __init__(self, load_config: LoadConfig | None = None) -> None:
        self.config = load_config or LoadConfig()

    def download_model(self, model_path: str | Path) -> Path:
        """The folder with the model's files, which must be on this machine: nothing is fetched from anywhere."""
        folder = Path(model_path)
        if not folder.is_dir():
            raise CheckpointError(
                f"no folder {model_path}: expected a downloaded model; fetch it first, and give its folder"
            )
        return folder

    @abstractmethod
    def load_model(self, model: Decoder, model_path: str | Path) -> None:
        """Fill every parameter of `model` from `model_path`, or raise `CheckpointError` with the model unchanged."""
