"""Fill a model: from safetensors files, with seeded random values, or from a rank's own saved state.

Every loader writes into the existing parameters through the model's weight map, and checks everything before it writes
anything: what is missing, unknown or misshapen is one error.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from weight_sync.layout.checkpoint_folder import opened
from weight_sync.layout.weight_map import Placement

from ..errors import ConfigError
from .checkpoint_files import CheckpointFiles, Source
from .decoder import Decoder
from .loader_config import LOAD_FORMATS, BaseModelLoader, LoadConfig
from .sharded_state import ShardedStateLoader


def get_model_loader(load_config: LoadConfig) -> BaseModelLoader:
    """The loader for a load format."""
    if load_config.load_format in ("auto", "safetensors"):
        return DefaultModelLoader(load_config)
    if load_config.load_format == "dummy":
        return DummyModelLoader(load_config)
    if load_config.load_format == "sharded_state":
        return ShardedStateLoader(load_config)
    raise ConfigError(
        f"unknown load_format: got {load_config.load_format!r}, expected one of {', '.join(LOAD_FORMATS)}; "
        "use 'auto' for a Hugging Face folder"
    )


class DefaultModelLoader(BaseModelLoader):
    """Reads the safetensors files of a Hugging Face folder, in parallel, and casts to the model's dtype."""

    def load_model(self, model: Decoder, model_path: str | Path) -> None:
        """Fill every parameter; names, shapes and the files' completeness are checked before the first copy."""
        files = CheckpointFiles(self.download_model(model_path))
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
        with opened(file) as tensors, torch.no_grad():
            for source, part in group:
                part.destination.copy_(source.read(tensors, part.region))


class DummyModelLoader(BaseModelLoader):
    """Random values that depend on the seed, the tensor's name and the position in the full tensor alone, and on the
    kind of device, which draws them itself.

    So every parallel layout holds parts of the same model.
    """

    def load_model(self, model: Decoder, model_path: str | Path = "") -> None:
        """Fill every parameter; `model_path` is not read."""
        by_name: dict[str, list[Placement]] = {}
        for part in model.weight_map.placements:
            by_name.setdefault(part.name, []).append(part)
        with ThreadPoolExecutor(self.config.num_threads) as pool:
            list(pool.map(self._fill, by_name.values()))
        model.refresh_derived_state()

    def _fill(self, parts: list[Placement]) -> None:
        name, shape, first = parts[0].name, parts[0].shape, parts[0].destination
        if first.is_cuda and len(parts) == 1 and tuple(first.shape) == shape:
            draw_dummy(name, first, self.config.seed)  # Where there is little memory left.
            return
        if first.is_cuda:
            full = draw_dummy(name, first.new_empty(shape), self.config.seed)
        else:
            full = draw_dummy(name, torch.empty(shape), self.config.seed)
        for part in parts:
            part.destination.copy_(full[tuple(slice(*bounds) for bounds in part.region)])


def draw_dummy(name: str, out: torch.Tensor, seed: int) -> torch.Tensor:
    """Fill `out`, a full tensor: ones for norms, else normal with a standard deviation of 0.02."""
    if name.endswith("norm.weight"):
        return out.fill_(1.0)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator(out.device)
    generator.manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    return out.normal_(0.0, 0.02, generator=generator)
