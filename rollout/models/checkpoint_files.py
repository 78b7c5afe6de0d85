"""The safetensors files of a checkpoint folder, and which of their tensors fill which name of a weight map."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from weight_sync.errors import TransportError
from weight_sync.layout.checkpoint_folder import opened, stored_tensors, weight_files
from weight_sync.layout.fused import Fused
from weight_sync.layout.region import Region
from weight_sync.layout.weight_map import WeightMap

from ..errors import CheckpointError

#: How safetensors writes the dtypes that a model may be stored in.
FLOATING = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where one checkpoint tensor lies."""

    file: Path
    """The safetensors file."""
    name: str
    """Its name in that file."""
    start: tuple[int, ...] = ()
    """Where it begins, when it is a part of a fused tensor, which may have more dimensions in front."""

    def read(self, tensors: Any, region: Region) -> torch.Tensor:
        """A region of the tensor out of its file, which is `opened`."""
        start = self.start or (0,) * len(region)
        new = len(start) - len(region)
        inner = zip(start[new:], region, strict=True)
        index = (*start[:new], *(slice(at + first, at + end) for at, (first, end) in inner))
        part: torch.Tensor = tensors.get_slice(self.name)[index]
        return part


class CheckpointFiles:
    """Reads headers only, until a loader asks for tensors."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            self.entries, self.problems = stored_tensors(weight_files(self.folder))
        except TransportError as error:
            raise CheckpointError(str(error)) from error

    def match(self, weight_map: WeightMap) -> dict[str, Source]:
        """For every canonical name of `weight_map` the tensor that fills it, or one error that lists all problems.

        A tied head may be there as well, if it is equal to the embedding, or instead of it; fused projections may
        stand for their parts.
        """
        shapes = {part.name: tuple(part.shape) for part in weight_map.placements}
        sources = {
            name: Source(file=entry.file, name=name)
            for name, entry in self.entries.items()
            if name in shapes and self._has_shape(name, shapes[name])
        }
        for name, entry in self.entries.items():
            if name in weight_map.names and entry.dtype.startswith("F8"):
                self.problems.append(
                    f"{name}: got {entry.dtype}, which means something together with a scale alone, expected one of "
                    f"{', '.join(FLOATING)}"
                )
            if name in weight_map.aliases:
                self._match_alias(name, weight_map.aliases[name], shapes, sources)
            elif name in weight_map.fused:
                self._match_fused(name, weight_map.fused[name], sources)
            elif name not in shapes and not weight_map.is_ignored(name):
                self.problems.append(f"{name}: unknown to this model")
        for name, shape in shapes.items():
            if name not in sources and name not in self.entries:
                self.problems.append(f"{name}: missing, expected shape {list(shape)}")
        self.raise_problems()
        return sources

    def _match_alias(
        self,
        name: str,
        target: str,
        shapes: Mapping[str, tuple[int, ...]],
        sources: dict[str, Source],
    ) -> None:
        if not self._has_shape(name, shapes[target]):
            return
        if target not in self.entries and target not in sources:
            sources[target] = Source(file=self.entries[name].file, name=name)
        elif target not in self.entries:
            self.problems.append(f"{name}: doubled, {sources[target].name} holds it as well")
        elif target in sources and not torch.equal(self.read(name), self.read(target)):
            self.problems.append(
                f"{name}: differs from {target}, which is the same tensor in this model (see tie_word_embeddings)"
            )

    def _match_fused(
        self,
        name: str,
        fused: Fused,
        sources: dict[str, Source],
    ) -> None:
        if not self._has_shape(name, fused.shape):
            return
        for part, start in zip(fused.parts, fused.starts, strict=True):
            if part in sources:
                self.problems.append(f"{part}: doubled, it is a part of {name} too")
            sources[part] = Source(file=self.entries[name].file, name=name, start=start)

    def _has_shape(self, name: str, expected: tuple[int, ...]) -> bool:
        got = self.entries[name].shape
        if got != expected:
            self.problems.append(f"{name}: got shape {list(got)}, expected {list(expected)}")
        return got == expected

    def read(self, name: str) -> torch.Tensor:
        """One tensor, whole."""
        with opened(self.entries[name].file) as tensors:
            tensor: torch.Tensor = tensors.get_tensor(name)
            return tensor

    @property
    def dtype(self) -> str | None:
        """Dtype of the first floating-point tensor, without the `torch.` prefix; None: there is none."""
        named = (FLOATING.get(entry.dtype) for _, entry in sorted(self.entries.items()))
        return next((dtype for dtype in named if dtype is not None), None)

    def raise_problems(self) -> None:
        """One `CheckpointError` for whatever has been found so far; nothing if all is well."""
        if self.problems:
            raise CheckpointError(
                f"the checkpoint {self.folder} does not fit its configuration:\n  "
                + "\n  ".join(self.problems)
                + "\nuse the config.json that belongs to these files, or complete them"
            )
