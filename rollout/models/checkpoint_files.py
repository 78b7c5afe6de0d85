"""The safetensors files of a checkpoint folder, and which of their tensors fill which name of a weight map."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec
import torch

from weight_sync.errors import TransportError
from weight_sync.layout import region as regions
from weight_sync.layout.checkpoint_folder import StoredTensor, stored_tensors, weight_files
from weight_sync.layout.fused import Fused
from weight_sync.layout.region import Region
from weight_sync.layout.weight_map import WeightMap

from ..errors import CheckpointError

#: How safetensors writes the dtypes that a model may be stored in.
FLOATING = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class Source(msgspec.Struct, frozen=True, gc=False):
    """Where one tensor of the model lies in the checkpoint."""

    stored: StoredTensor
    """What holds it."""
    fused: Fused | None = None
    """How `stored` is made up of several; None: it is the tensor itself."""
    part: int = 0
    """Which one of them."""

    def view(self, region: Region) -> torch.Tensor:
        """A region of the tensor, where it lies in its file."""
        if self.fused is None:
            return regions.part(self.stored.view(), region)
        part = regions.part(self.stored.view(), self.fused.region(self.part, region))
        return part.view(regions.sizes(region))


class CheckpointFiles:
    """Reads headers only, until a loader asks for tensors."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            self.entries, self.problems = stored_tensors(weight_files(self.folder))
        except TransportError as error:
            raise CheckpointError(str(error)) from error

    def match(self, weight_map: WeightMap) -> dict[str, Source]:
        """For every canonical name of `weight_map` the tensor that fills it, in the order of the files' bytes, or one
        error that lists all problems.

        A tied head may be there as well, if it is equal to the embedding, or instead of it; fused projections may
        stand for their parts.
        """
        shapes = {name: parts[0].shape for name, parts in weight_map.parts.items()}
        sources: dict[str, Source] = {}
        for name, entry in self.entries.items():
            if name in shapes:
                if self._fits(entry, shapes[name]):
                    sources[name] = Source(entry)
            elif name in weight_map.aliases:
                self._match_alias(entry, weight_map.aliases[name], shapes, sources)
            elif name in weight_map.fused:
                self._match_fused(entry, weight_map.fused[name], sources)
            elif not weight_map.is_ignored(name):
                self.problems.append(f"{name}: unknown to this model")
        for name, shape in shapes.items():
            if name not in sources and name not in self.entries:
                self.problems.append(f"{name}: missing, expected shape {list(shape)}")
        self.raise_problems()
        return sources

    def _match_alias(
        self,
        entry: StoredTensor,
        target: str,
        shapes: Mapping[str, tuple[int, ...]],
        sources: dict[str, Source],
    ) -> None:
        if not self._fits(entry, shapes[target]):
            return
        twin = self.entries.get(target)
        if twin is None and target in sources:
            holder = sources[target].stored.name
            self.problems.append(f"{entry.name}: doubled, {holder} holds it as well")
        elif twin is None:
            sources[target] = Source(entry)
        elif twin.shape == entry.shape and not torch.equal(entry.view(), twin.view()):
            self.problems.append(
                f"{entry.name}: differs from {target}, which is the same tensor in this model (see tie_word_embeddings)"
            )

    def _match_fused(self, entry: StoredTensor, fused: Fused, sources: dict[str, Source]) -> None:
        if not self._fits(entry, fused.shape):
            return
        for i, part in enumerate(fused.parts):
            if part in sources or part in self.entries:
                self.problems.append(f"{part}: doubled, it is a part of {entry.name} too")
            sources[part] = Source(entry, fused, i)

    def _fits(self, entry: StoredTensor, expected: tuple[int, ...]) -> bool:
        if entry.dtype not in FLOATING:
            self.problems.append(
                f"{entry.name}: got {entry.dtype}, which means something together with a scale alone, expected one of "
                f"{', '.join(FLOATING)}"
            )
        if entry.shape != expected:
            self.problems.append(
                f"{entry.name}: got shape {list(entry.shape)}, expected {list(expected)}"
            )
        return entry.shape == expected

    def read(self, name: str) -> torch.Tensor:
        """One tensor, whole, where it lies in its file."""
        return self.entries[name].view()

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
