"""Fill a model: from safetensors files, with seeded random values, or from a rank's own saved state.

Every loader writes into the existing parameters through the model's weight map, and checks everything before it writes
anything: what is missing, unknown or misshapen is one error.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from weight_sync.layout.weight_map import Placement

from ..errors import CheckpointError, ConfigError
from .checkpoint_files import CheckpointFiles, Source
from .decoder import Decoder

LOAD_FORMATS = ("auto", "safetensors", "dummy", "sharded_state")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadConfig:
    """Where a model's first weights come from."""

    load_format: Literal["auto", "safetensors", "dummy", "sharded_state"] = "auto"
    """"auto" is "safetensors"; "dummy" reads no file; "sharded_state" reads what `ShardedStateLoader.save` wrote."""
    seed: int = 0
    """Seed of dummy weights."""
    num_threads: int = 4
    """Threads that read, or draw, tensors."""


class ModelLoader(Protocol):
    """Fills the parameters of a model in place; may be called any number of times on the same model."""

    def load(self, model: Decoder, model_path: str | Path) -> None:
        """Fill every parameter of `model` from `model_path`, or raise `CheckpointError` with the model unchanged."""


def get_model_loader(load_config: LoadConfig) -> ModelLoader:
    """The loader for a load format."""
    if load_config.load_format in ("auto", "safetensors"):
        return DefaultModelLoader(load_config)
    if load_config.load_format == "dummy":
        return DummyModelLoader(load_config)
    if load_config.load_format == "sharded_state":
        return ShardedStateLoader()
    raise ConfigError(
        f"unknown load_format: got {load_config.load_format!r}, expected one of {', '.join(LOAD_FORMATS)}; "
        "use 'auto' for a Hugging Face folder"
    )


class DefaultModelLoader:
    """Reads the safetensors files of a Hugging Face folder, in parallel, and casts to the model's dtype."""

    def __init__(self, load_config: LoadConfig | None = None) -> None:
        self.config = load_config or LoadConfig()

    def load(self, model: Decoder, model_path: str | Path) -> None:
        """Fill every parameter; names, shapes and the files' completeness are checked before the first copy."""
        files = CheckpointFiles(model_path)
        sources = files.match(model.weight_map)
        parts = model.weight_map.placements
        work = _spread([(sources[part.name], part) for part in parts], self.config.num_threads)
        with ThreadPoolExecutor(self.config.num_threads) as pool:
            for done in [pool.submit(_copy_parts, share) for share in work]:
                done.result()
        model.refresh_derived_state()


def _spread(
    parts: list[tuple[Source, Placement]], num_shares: int
) -> list[list[tuple[Source, Placement]]]:
    """Runs of neighbouring parts, about equal in bytes, so that each thread reads its files front to back."""
    parts = sorted(parts, key=lambda pair: (pair[0].file, pair[0].name))
    total = sum(part.destination.nbytes for _, part in parts)
    shares: list[list[tuple[Source, Placement]]] = [[] for _ in range(num_shares)]
    seen = 0
    for source, part in parts:
        shares[min(seen * num_shares // max(total, 1), num_shares - 1)].append((source, part))
        seen += part.destination.nbytes
    return [share for share in shares if share]


def _copy_parts(parts: list[tuple[Source, Placement]]) -> None:
    """Copy each part of a checkpoint tensor to its destination; runs on a thread of its own."""
    by_file: dict[Path, list[tuple[Source, Placement]]] = {}
    for source, part in parts:
        by_file.setdefault(source.file, []).append((source, part))
    for file, group in by_file.items():
        with safe_open(file, framework="pt", device="cpu") as opened, torch.no_grad():
            for source, part in group:
                (first, last), *columns = part.region
                rows = slice(source.first_row + first, source.first_row + last)
                region = (rows, *(slice(*bounds) for bounds in columns))
                part.destination.copy_(opened.get_slice(source.name)[region])


class DummyModelLoader:
    """Random values that depend on the seed, the tensor's name and the position in the full tensor alone.

    So every parallel layout holds parts of the same model.
    """

    def __init__(self, load_config: LoadConfig | None = None) -> None:
        self.config = load_config or LoadConfig(load_format="dummy")

    def load(self, model: Decoder, model_path: str | Path = "") -> None:
        """Fill every parameter; `model_path` is not read."""
        by_name: dict[str, list[Placement]] = {}
        for part in model.weight_map.placements:
            by_name.setdefault(part.name, []).append(part)
        with ThreadPoolExecutor(self.config.num_threads) as pool:
            list(pool.map(self._fill, by_name.values()))
        model.refresh_derived_state()

    def _fill(self, parts: list[Placement]) -> None:
        full = dummy_tensor(parts[0].name, parts[0].shape, self.config.seed)
        for part in parts:
            part.destination.copy_(full[tuple(slice(*bounds) for bounds in part.region)])


def dummy_tensor(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """The full dummy tensor, float32: ones for norms, else normal with a standard deviation of 0.02."""
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    return torch.empty(shape).normal_(0.0, 0.02, generator=generator)


class ShardedStateLoader:
    """One file per rank with the parameters as they lie in memory: nothing is cut or cast."""

    @staticmethod
    def file_of(model: Decoder, model_path: str | Path) -> Path:
        """Where the state of `model`'s rank lies."""
        return Path(model_path) / f"rank-{model.tp.rank}-of-{model.tp.size}.safetensors"

    def save(self, model: Decoder, model_path: str | Path) -> None:
        """Write this rank's parameters; `load` reads them into a model of the same configuration and layout."""
        Path(model_path).mkdir(parents=True, exist_ok=True)
        state = {name: parameter.data for name, parameter in model.named_parameters()}
        save_file(state, self.file_of(model, model_path))

    def load(self, model: Decoder, model_path: str | Path) -> None:
        """Fill every parameter from what `save` wrote."""
        file = self.file_of(model, model_path)
        try:
            opened = safe_open(file, framework="pt", device="cpu")
        except Exception as error:
            raise CheckpointError(
                f"cannot open this rank's state {file}: got {type(error).__name__}: {error}; expected a file "
                "that ShardedStateLoader.save wrote; save it with the same tp_size"
            ) from error
        with opened, torch.no_grad():
            saved = {name: opened.get_tensor(name) for name in opened.keys()}
            problems = _state_problems(dict(model.named_parameters()), saved)
            if problems:
                raise CheckpointError(
                    f"{file} does not hold this model's state:\n  "
                    + "\n  ".join(problems)
                    + "\nsave it again "
                    "with the same model configuration, dtype and tp_size"
                )
            for name, parameter in model.named_parameters():
                parameter.copy_(saved[name])
        model.refresh_derived_state()


def _state_problems(
    expected: dict[str, torch.nn.Parameter], saved: dict[str, torch.Tensor]
) -> list[str]:
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
