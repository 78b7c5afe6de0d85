"""The safetensors files of a checkpoint folder, and which of their tensors fill which name of a weight map."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from weight_sync.layout.weight_map import WeightMap

from ..errors import CheckpointError

INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where one checkpoint tensor lies."""

    file: Path
    """The safetensors file."""
    name: str
    """Its name in that file."""
    first_row: int = 0
    """Where it begins along dim 0, when it is a part of a fused tensor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    file: Path
    shape: tuple[int, ...]


class CheckpointFiles:
    """Reads headers only, until a loader asks for tensors."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.problems: list[str] = []
        self.entries: dict[str, _Entry] = {}
        listed = self._index()
        for file in sorted(set(listed.values())) if listed else self._unlisted_files():
            self._read_header(file)
        for name, file in listed.items():
            entry = self.entries.get(name)
            if entry is None or entry.file != file:
                self.problems.append(
                    f"{name}: {INDEX_FILE} places it in {file.name}, which lacks it"
                )

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
        for name in self.entries:
            if name in weight_map.aliases:
                self._match_alias(name, weight_map.aliases[name], shapes, sources)
            elif name in weight_map.fused:
                self._match_fused(name, weight_map.fused[name], shapes, sources)
            elif name not in shapes and not weight_map.is_ignored(name):
                self.problems.append(f"{name}: unknown to this model")
        for name, shape in shapes.items():
            if name not in sources and name not in self.entries:
                self.problems.append(f"{name}: missing, expected shape {list(shape)}")
        self._raise_problems()
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
        if target not in self.entries:
            sources[target] = Source(file=self.entries[name].file, name=name)
        elif target in sources and not torch.equal(self.read(name), self.read(target)):
            self.problems.append(
                f"{name}: differs from {target}, to which the configuration ties it "
                "(tie_word_embeddings)"
            )

    def _match_fused(
        self,
        name: str,
        parts: Iterable[str],
        shapes: Mapping[str, tuple[int, ...]],
        sources: dict[str, Source],
    ) -> None:
        parts = tuple(parts)
        rows = [shapes[part][0] for part in parts]
        if not self._has_shape(name, (sum(rows), *shapes[parts[0]][1:])):
            return
        first = 0
        for part, size in zip(parts, rows, strict=True):
            if part in self.entries:
                self.problems.append(f"{part}: doubled, it is a part of {name} too")
            sources[part] = Source(file=self.entries[name].file, name=name, first_row=first)
            first += size

    def _has_shape(self, name: str, expected: tuple[int, ...]) -> bool:
        got = self.entries[name].shape
        if got != expected:
            self.problems.append(f"{name}: got shape {list(got)}, expected {list(expected)}")
        return got == expected

    def read(self, name: str) -> torch.Tensor:
        """One tensor, whole."""
        with safe_open(self.entries[name].file, framework="pt", device="cpu") as opened:
            return opened.get_tensor(name)

    def _index(self) -> dict[str, Path]:
        """Names to files as the index says; empty when there is none."""
        path = self.folder / INDEX_FILE
        if not path.is_file():
            return {}
        try:
            names = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
            return {str(name): self.folder / Path(str(file)).name for name, file in names.items()}
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(
                f"cannot read {path}: got {type(error).__name__}: {error}; expected a JSON object with a weight_map; "
                "download the checkpoint again"
            ) from error

    def _unlisted_files(self) -> list[Path]:
        single = self.folder / "model.safetensors"
        files = [single] if single.is_file() else sorted(self.folder.glob("*.safetensors"))
        if not files:
            raise CheckpointError(
                f"no weights in {self.folder}: got no *.safetensors file, expected model.safetensors or "
                f"{INDEX_FILE}; save the model with save_pretrained, or use load_format='dummy'"
            )
        return files

    def _read_header(self, file: Path) -> None:
        try:
            with safe_open(file, framework="pt", device="cpu") as opened:
                for name in opened.keys():
                    if name in self.entries:
                        self.problems.append(
                            f"{name}: doubled, in {self.entries[name].file.name} and {file.name}"
                        )
                    shape = tuple(opened.get_slice(name).get_shape())
                    self.entries[name] = _Entry(file=file, shape=shape)
        except Exception as error:
            self.problems.append(f"{file.name}: cannot be read: {type(error).__name__}: {error}")

    def _raise_problems(self) -> None:
        if self.problems:
            raise CheckpointError(
                f"the checkpoint {self.folder} does not fit its configuration:\n  "
                + "\n  ".join(self.problems)
                + "\nuse the config.json that belongs to these files, or complete them"
            )
