"""Fill a model: from safetensors files, with seeded random values, or from a rank's own saved state.

Every loader writes into the existing parameters through the model's weight map, and checks everything before it writes
anything: what is missing, unknown or misshapen is one error.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, pairwise
from pathlib import Path

import torch

from weight_sync.layout.parallel_copy import copy_group
from weight_sync.layout.weight_map import Placement

from ..errors import ConfigError
from .checkpoint_files import CheckpointFiles
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
        destinations: list[torch.Tensor] = []
        sources: list[torch.Tensor] = []
        for name, source in files.match(model.weight_map).items():
            for part in model.weight_map.parts[name]:
                destinations.append(part.destination)
                sources.append(source.view(part.region))
        with ThreadPoolExecutor(self.config.num_threads) as pool:
            for done in [
                pool.submit(copy_group, destinations[share], sources[share])
                for share in _spread(destinations, self.config.num_threads)
            ]:
                done.result()
        model.refresh_derived_state()


def _spread(tensors: list[torch.Tensor], num_shares: int) -> Iterator[slice]:
    """Runs of neighbours, about equal in bytes, so that each thread reads its files front to back."""
    ends = list(accumulate(tensor.nbytes for tensor in tensors))
    cuts = [bisect_left(ends, ends[-1] * share / num_shares) for share in range(num_shares)]
    return (slice(a, b) for a, b in pairwise((*cuts, len(ends))) if a < b)


class DummyModelLoader(BaseModelLoader):
    """Random values that depend on the seed, the tensor's name and the position in the full tensor alone, and on the
    kind of device, which draws them itself.

    So every parallel layout holds parts of the same model.
    """

    def load_model(self, model: Decoder, model_path: str | Path = "") -> None:
        """Fill every parameter; `model_path` is not read."""
        with ThreadPoolExecutor(self.config.num_threads) as pool:
            list(pool.map(self._fill, model.weight_map.parts.values()))
        model.refresh_derived_state()

    def _fill(self, parts: Sequence[Placement]) -> None:
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
