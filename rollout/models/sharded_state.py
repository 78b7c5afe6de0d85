"""A rank's parameters as they lie in memory, in files of its own: nothing is cut, joined or cast, saving or loading."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from weight_sync.errors import TransportError
from weight_sync.layout.checkpoint_folder import opened

from ..errors import CheckpointError, ConfigError
from .decoder import Decoder
from .loader_config import BaseModelLoader

DEFAULT_PATTERN = "model-rank-{rank}-part-{part}.safetensors"
DEFAULT_MAX_SIZE = 5 * 1024**3
COMPANIONS = (".json", ".jinja", ".model", ".txt")
"""Suffixes of the small files beside a model's weights."""


class ShardedStateLoader(BaseModelLoader):
    """Reads what `save_model` wrote into a model of the same configuration, dtype and `tp_size`."""

    def load_model(self, model: Decoder, model_path: str | Path) -> None:
        """Fill every parameter of this rank; `CheckpointError` with the model unchanged if the files hold another's."""
        folder = self.download_model(model_path)
        with torch.no_grad():
            saved = self._read(model, folder)
            problems = _problems(dict(model.named_parameters()), saved)
            if problems:
                raise CheckpointError(
                    f"{folder} does not hold the state of rank {model.tp.rank} of this model:\n  "
                    + "\n  ".join(problems)
                    + "\nsave it again with the same model configuration, dtype and tp_size"
                )
            for name, parameter in model.named_parameters():
                parameter.copy_(saved[name])
        model.refresh_derived_state()

    @staticmethod
    def save_model(
        model: Decoder,
        path: str | Path,
        pattern: str | None = None,
        max_size: int | None = None,
    ) -> list[Path]:
        """Write this rank's parameters into the folder `path`, and return the files.

        pattern: their names, with `{rank}` and `{part}` (`DEFAULT_PATTERN`). max_size: bytes of tensors in a part
        (5 GiB), which holds one tensor at least. A file has its name when it is complete, the first part last, and
        replaces none: the parts of two saves must not be mixed. Raises `ConfigError` and `CheckpointError`.
        """
        pattern = check_pattern(pattern)
        limit = DEFAULT_MAX_SIZE if max_size is None else max_size
        if limit <= 0:
            raise ConfigError(f"max_size: got {limit}, expected a positive number of bytes")
        folder = Path(path)
        first = folder / pattern.format(rank=model.tp.rank, part=0)
        if first.exists():
            raise CheckpointError(
                f"cannot save into {folder}: got {first.name} of an earlier save, expected none; choose another folder"
            )
        parts = list(_parts(model, limit))
        about = {"tp_size": str(model.tp.size), "num_parts": str(len(parts))}
        files = [
            folder / pattern.format(rank=model.tp.rank, part=part) for part in range(len(parts))
        ]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for file, part in reversed(list(zip(files, parts, strict=True))):
                partial = file.with_name(f".{file.name}.partial")
                save_file(part, partial, metadata=about)
                os.replace(partial, file)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"cannot save this rank's state in {folder}: got {error}, expected a writable folder with room for "
                "it; free some, or choose another place"
            ) from error
        return files

    def _read(self, model: Decoder, folder: Path) -> dict[str, torch.Tensor]:
        """All tensors of this rank's files."""
        saved: dict[str, torch.Tensor] = {}
        rank, part, num_parts = model.tp.rank, 0, 1
        while part < num_parts:
            file = folder / check_pattern(self.config.pattern).format(rank=rank, part=part)
            try:
                with opened(file) as tensors:
                    about = tensors.metadata() or {}
                    num_parts = int(about.get("num_parts", 1))
                    saved |= {name: tensors.get_tensor(name) for name in tensors.keys()}
            except (TransportError, ValueError) as error:
                raise CheckpointError(
                    f"cannot open this rank's state {file}: got {type(error).__name__}: {error}; expected a file that "
                    "save_sharded_model wrote; save it again"
                ) from error
            tp_size = about.get("tp_size")
            if tp_size != str(model.tp.size):
                raise CheckpointError(
                    f"{file} is of an engine of other ranks: got tp_size {tp_size}, expected {model.tp.size}; start "
                    "with that tp_size, or save it again"
                )
            part += 1
        return saved


def copy_companions(model_path: str | Path, path: str | Path) -> None:
    """Copy a model's small files (configuration, tokenizer) into the folder `path`, for an engine to start from."""
    source, target = Path(model_path), Path(path)
    try:
        target.mkdir(parents=True, exist_ok=True)
        for file in sorted(source.iterdir()) if source.resolve() != target.resolve() else []:
            is_index = file.name.endswith(".index.json")
            if file.suffix in COMPANIONS and file.is_file() and not is_index:
                shutil.copyfile(file, target / file.name)
    except OSError as error:
        raise CheckpointError(
            f"cannot write to {path}: got {error}, expected a writable folder; choose another place"
        ) from error


def check_pattern(pattern: str | None) -> str:
    """`pattern`, or the usual one; `ConfigError` unless it names a file for each rank and part."""
    pattern = DEFAULT_PATTERN if pattern is None else pattern
    try:
        names = {pattern.format(rank=rank, part=part) for rank in range(2) for part in range(2)}
    except (LookupError, ValueError, AttributeError):
        names = set()
    if len(names) < 4 or any(Path(name).name != name for name in names):
        raise ConfigError(
            f"pattern: got {pattern!r}, expected a file name with {{rank}} and {{part}}, as {DEFAULT_PATTERN!r}"
        )
    return pattern


def _parts(model: Decoder, max_size: int) -> Iterator[dict[str, torch.Tensor]]:
    part: dict[str, torch.Tensor] = {}
    size = 0
    for name, parameter in model.named_parameters():
        if part and size + parameter.nbytes > max_size:
            yield part
            part, size = {}, 0
        part[name] = parameter.data
        size += parameter.nbytes
    yield part


def _problems(expected: dict[str, torch.nn.Parameter], saved: dict[str, torch.Tensor]) -> list[str]:
    problems = [f"{name}: missing" for name in expected if name not in saved]
    problems += [f"{name}: unknown" for name in saved if name not in expected]
    for name, tensor in saved.items():
        parameter = expected.get(name)
        if parameter is None:
            continue
        got, want = (tensor.dtype, list(tensor.shape)), (parameter.dtype, list(parameter.shape))
        if got != want:
            problems.append(f"{name}: got {got[0]} {got[1]}, expected {want[0]} {want[1]}")
    return problems
