"""Where a model keeps each tensor of its trainer: the one table behind loading, live sync, read-back and checks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from ..errors import ManifestMismatch
from . import region as regions
from .coverage import coverage_problems
from .fused import Fused
from .manifest import DTYPES, MAX_NAME_LENGTH, TensorMeta, dtype_name, mismatch
from .memory import Storage, byte_range, storage_key
from .region import Region


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """One rectangular part of a trainer tensor, and the view of an engine parameter that holds it."""

    name: str
    """Hugging Face name of the trainer's tensor."""
    shape: tuple[int, ...]
    """Shape of the whole trainer tensor."""
    region: Region
    """The part, as half-open ranges, one per dimension; empty for a scalar."""
    destination: torch.Tensor
    """The parameter's memory for it, of the part's shape; contiguous or strided, on any device."""

    @classmethod
    def whole(cls, name: str, destination: torch.Tensor) -> Placement:
        """All of a trainer tensor that has the shape of `destination`."""
        shape = tuple(destination.shape)
        return cls(name=name, shape=shape, region=regions.whole(shape), destination=destination)


@dataclass(frozen=True, slots=True, kw_only=True)
class Located:
    """A name that a trainer may send, and all places that hold it here."""

    meta: TensorMeta
    """Name, whole shape, and the dtype in which the engine holds it."""
    placements: tuple[Placement, ...]
    """Parts in this process; their regions are parts of `meta`'s shape, whatever tensors they belong to."""
    canonical: tuple[str, ...]
    """The canonical tensors that it stands for: itself, what an alias names, or the components of a fused tensor."""

    def read(self) -> torch.Tensor:
        """A copy of what is resident; parts that other ranks hold are zero, so that the sum over ranks is the whole."""
        device = self.placements[0].destination.device
        result = torch.zeros(self.meta.shape, dtype=self.meta.dtype, device=device)
        with torch.no_grad():
            for placement in self.placements:
                regions.part(result, placement.region).copy_(placement.destination)
        return result

    def mask(self) -> torch.Tensor:
        """Which elements of `read` are resident here: bool, of the whole tensor's shape."""
        mask = torch.zeros(self.meta.shape, dtype=torch.bool)
        for placement in self.placements:
            regions.part(mask, placement.region).fill_(True)
        return mask


class WeightMap:
    """The table of a model on one rank; checked when it is built, and constant afterwards.

    Every element of every parameter is covered exactly once, and no part of a trainer tensor is placed twice.
    """

    def __init__(
        self,
        placements: Sequence[Placement],
        parameters: Mapping[str, torch.Tensor],
        *,
        aliases: Mapping[str, str] | None = None,
        fused: Mapping[str, Sequence[str] | Fused] | None = None,
        ignored: AbstractSet[str] | Callable[[str], bool] = frozenset(),
    ) -> None:
        """Check the table; `ManifestMismatch` lists all that is wrong with it.

        `aliases`: other names of canonical tensors (tied weights). `fused`: names that each stand for several
        canonical tensors, as a `Fused` or, where they are joined along dimension 0, just their names. `ignored`:
        names that trainers may send and that have no memory here (a set, or a predicate).

        A rank that holds nothing of a tensor places an empty part of it: the names are the same on all ranks.
        """
        self.placements = tuple(placements)
        self.parameters = dict(parameters)
        self.aliases = dict(aliases or {})
        self._ignored = ignored
        by_name: defaultdict[str, list[Placement]] = defaultdict(list)
        for placement in self.placements:
            by_name[placement.name].append(placement)
        self.fused: dict[str, Fused] = {}
        """Names that stand for several canonical tensors."""
        problems = [problem for parts in by_name.values() for problem in _tensor_problems(parts)]
        problems += coverage_problems(
            self.parameters, [(p.name, p.destination) for p in self.placements]
        )
        problems += self._name_problems(by_name)
        problems += self._fuse(fused or {}, by_name)
        if problems:
            raise mismatch(
                "the weight map does not fit the model",
                problems,
                "place every element of every parameter exactly once",
            )
        self.parts = {name: tuple(parts) for name, parts in by_name.items()}
        """The placements of each canonical tensor."""

    def metas(self) -> tuple[TensorMeta, ...]:
        """The canonical tensors in resident order: a manifest of them is copied in as few pieces as there can be."""
        return self._metas

    @cached_property
    def names(self) -> frozenset[str]:
        """Every name that `locate` knows: canonical, alias and fused."""
        return frozenset((*self.parts, *self.aliases, *self.fused))

    def is_ignored(self, name: str) -> bool:
        """Whether a trainer may send `name` although the model has no memory for it."""
        return self._ignored(name) if callable(self._ignored) else name in self._ignored

    def locate(self, name: str) -> Located:
        """Where `name` is: a canonical name, an alias, or a fused name. `ManifestMismatch` for any other."""
        if name in self.fused:
            return self._locate_fused(name)
        placements = self.parts.get(self.aliases.get(name, name))
        if placements is None:
            raise ManifestMismatch(
                f"no such weight: got {name!r}, expected one of the model's {len(self.parts)} names "
                f"such as {next(iter(self.parts), '(none)')!r}; send Hugging Face names"
            )
        first = placements[0]
        return Located(
            meta=TensorMeta(name=name, shape=first.shape, dtype=first.destination.dtype),
            placements=placements,
            canonical=(first.name,),
        )

    def occupied(self) -> Mapping[Storage, Sequence[tuple[int, int]]]:
        """The byte ranges of all placements, sorted, by allocation: what lies between them there is padding."""
        return self._occupied

    def read(self, name: str) -> torch.Tensor:
        """A copy of the resident tensor; aliases and fused names too."""
        return self.locate(name).read()

    def _locate_fused(self, name: str) -> Located:
        fused = self.fused[name]
        placements = [
            replace(
                placement,
                name=name,
                shape=fused.shape,
                region=fused.region(i, placement.region),
                destination=fused.lifted(placement.destination),
            )
            for i, part in enumerate(fused.parts)
            for placement in self.parts[part]
        ]
        return Located(
            meta=TensorMeta(name=name, shape=fused.shape, dtype=placements[0].destination.dtype),
            placements=tuple(placements),
            canonical=fused.parts,
        )

    @cached_property
    def _occupied(self) -> dict[Storage, list[tuple[int, int]]]:
        ranges: defaultdict[Storage, list[tuple[int, int]]] = defaultdict(list)
        for placement in self.placements:
            if placement.destination.numel():
                ranges[storage_key(placement.destination)].append(byte_range(placement.destination))
        return {key: sorted(held) for key, held in ranges.items()}

    @cached_property
    def _metas(self) -> tuple[TensorMeta, ...]:
        storages: dict[tuple[torch.device, int], int] = {}
        last: dict[torch.dtype, tuple[int, int]] = {}

        def where(name: str) -> tuple[int, int]:
            tensor = self.parts[name][0].destination
            if tensor.numel():
                number = storages.setdefault(storage_key(tensor), len(storages))
                last[tensor.dtype] = number, tensor.data_ptr()
            # What is on other ranks alone comes where it would be here: behind the one that was placed before it.
            return last.get(tensor.dtype, (0, 0))

        order = {name: where(name) for name in self.parts}
        return tuple(self.locate(name).meta for name in sorted(order, key=order.__getitem__))

    def _name_problems(self, by_name: Mapping[str, Sequence[Placement]]) -> Iterator[str]:
        for name, target in self.aliases.items():
            if target not in by_name:
                yield f"{name}: got an alias of {target!r}, expected the name of a placed tensor"
        for name in self.aliases:
            if name in by_name:
                yield f"{name}: got two meanings, expected canonical name, alias or fused name"

    def _fuse(
        self,
        fused: Mapping[str, Sequence[str] | Fused],
        by_name: Mapping[str, Sequence[Placement]],
    ) -> Iterator[str]:
        """Fill `fused` with what is sound; the problems of the rest."""
        for name, given in fused.items():
            if name in by_name or name in self.aliases:
                yield f"{name}: got two meanings, expected canonical name, alias or fused name"
            parts = given.parts if isinstance(given, Fused) else tuple(given)
            unknown = [part for part in parts if part not in by_name]
            if unknown or not parts:
                yield f"{name}: got the components {unknown or '()'}, expected placed tensors"
                continue
            shapes = {part: by_name[part][0].shape for part in parts}
            if not isinstance(given, Fused):
                rows = {shape[1:] if shape else None for shape in shapes.values()}
                if len(rows) > 1 or None in rows:
                    yield f"{name}: got components {list(parts)}, expected equal rows and dtypes"
                    continue
                given = Fused.joined(shapes)
            if len({by_name[part][0].destination.dtype for part in parts}) > 1:
                yield f"{name}: got components {list(parts)}, expected equal rows and dtypes"
            yield from (f"{name}: {problem}" for problem in given.problems(shapes))
            self.fused[name] = given


def _tensor_problems(placements: Sequence[Placement]) -> Iterator[str]:
    """What is wrong with the parts of one trainer tensor."""
    first = placements[0]
    name, shape, dtype = first.name, first.shape, first.destination.dtype
    if not 0 < len(name) <= MAX_NAME_LENGTH or DTYPES.get(dtype_name(dtype)) is not dtype:
        yield f"{name[:80]!r} {dtype}: expected a name to 512 characters and a dtype that travels"
    for placement in placements:
        if (placement.shape, placement.destination.dtype) != (shape, dtype):
            yield (
                f"{name}: got parts of {dtype} {list(shape)} and of {placement.destination.dtype} "
                f"{list(placement.shape)}, expected one tensor"
            )
            return
        got = tuple(placement.destination.shape)
        if not regions.inside(placement.region, shape):
            yield f"{name}: got region {placement.region}, expected a part of {list(shape)}"
            return
        if regions.sizes(placement.region) != got:
            yield (
                f"{name}: got a destination of shape {list(got)}, expected "
                f"{list(regions.sizes(placement.region))}, the shape of region {placement.region}"
            )
    for a, b in regions.overlapping([p.region for p in placements]):
        yield f"{name}: got regions {a} and {b}, expected every element placed once"
