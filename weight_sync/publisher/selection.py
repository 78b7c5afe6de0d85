"""From a trainer's named tensors to rows of the engine's manifest, with every problem in one error.

A trainer may send canonical names, aliases (tied weights, which must agree byte for byte) and fused names (split into
their parts); another floating-point dtype is a cast, which is reported. Anything else is a problem, and problems are
raised together, before a byte is staged.
"""

import difflib
from collections.abc import Callable, ItemsView, Iterable, Iterator
from dataclasses import dataclass, field
from operator import attrgetter, eq, is_
from typing import Any

import numpy as np
import torch

from ..layout.device_sums import addresses_of
from ..layout.encoding import FULL, Encoding
from ..layout.manifest import QUANTISED, Manifest, dtype_name, mismatch
from ..layout.named_tensors import OFFSETS, checked_pair, is_nowhere, unreadable
from ..wire.messages import EngineInfo
from .same_layouts import Guard, guard_of
from .sources import Listed, is_listed, unwrapped

_PLAIN = (torch.Tensor, torch.nn.Parameter)
_DTYPE, _LAYOUT, _IS_META, _IS_NESTED = map(attrgetter, ("dtype", "layout", "is_meta", "is_nested"))
_AT_ONCE = 256
"""Tensors that are asked everything before the next ones: what one question has brought into the cache, the others
find there."""
Ahead = Callable[[list[torch.Tensor], np.ndarray, int, object], None]
"""Is given all tensors in the trainer's order, their addresses, how many of these are known so far, and
`Selection.layouts` of them."""
_HINTED = 5
_HINT_WORK = 20_000
"""Names that a search for similar ones looks at, in total; it takes tens of microseconds each."""


@dataclass(slots=True, kw_only=True)
class Repeated:
    """Names of all tensors in a trainer's order, and what each has to be: with the same names again, many tensors are
    compared in one call, or column by column. No tensor is kept."""

    names: list[str]
    """As they were given."""
    rows: np.ndarray
    """Of the manifest, int64."""
    origin: list[str | None]
    """The names in the order of the manifest."""
    dtypes: list[torch.dtype]
    """The engine's."""
    shapes: list[tuple[int, ...]]
    """The engine's."""
    guards: list[Guard | None]
    """Of each part (`_AT_ONCE`) in the trainer's order: says whether tensors are laid out as those that came last."""
    layouts: object = field(default_factory=object)
    """Another one as soon as any tensor is laid out in another way than before."""

    @property
    def same(self) -> object:
        """`Selection.layouts`."""
        return None if None in self.guards else self.layouts

    def tensors(
        self, listed: Listed, ahead: Ahead | None = None
    ) -> tuple[list[torch.Tensor], np.ndarray] | None:
        """Those of `listed` in its order, and their addresses (uint64); None where anything is not as it was."""
        columns = _columns(listed)
        if columns is None:
            return None
        names, tensors = columns
        if names != self.names:
            return None
        addresses = np.zeros(len(tensors), dtype=np.uint64)
        same = self.same
        for number, first in enumerate(range(0, len(tensors), _AT_ONCE)):
            part = tensors[first : first + _AT_ONCE]
            if not set(map(type, part)).issubset(_PLAIN):
                return None
            if any(map(_IS_NESTED, part)):  # at which torch's guards abort
                return None
            guard = self.guards[number]
            if guard is None or not guard(*part):
                if not self._fit(part, first):
                    return None
                self.layouts = object()  # they have other strides, or are elsewhere
                self.guards[number] = guard_of(part)
                same = None
            last = first + len(part)
            addresses[first:last] = found = addresses_of(part)
            # Memory may have been given back.
            if found.min() < OFFSETS and any(map(is_nowhere, part)) and any(map(unreadable, part)):
                return None
            if ahead is not None:
                ahead(tensors, addresses, last, same)
        return tensors, addresses

    def _fit(self, part: list[torch.Tensor], first: int) -> bool:
        """Whether tensors have the engine's dtypes and shapes, and data."""
        last = first + len(part)
        return (
            all(map(is_, map(_DTYPE, part), self.dtypes[first:last]))
            and all(map(eq, map(torch.Tensor.size, part), self.shapes[first:last]))
            and set(map(_LAYOUT, part)) == {torch.strided}
            and not any(map(_IS_META, part))
        )


class Layout:
    """The arena of one engine as its trainer sees it: the engine's tensors, in its order, in the trainer's buckets."""

    def __init__(self, info: EngineInfo, bucket_bytes: int, encoding: Encoding = FULL) -> None:
        canonical = Manifest.from_wire(info.manifest)
        self.manifest = Manifest(tensors=canonical.tensors, bucket_bytes=bucket_bytes)
        """The model's tensors."""
        self.encoding = encoding
        self.carried = Manifest(
            tensors=tuple(map(encoding.carried, canonical.tensors)), bucket_bytes=bucket_bytes
        )
        """What is in the arena for each of them."""
        self.index = self.manifest.index
        self.shapes = [meta.shape for meta in self.manifest.tensors]
        self.dtypes = [meta.dtype for meta in self.manifest.tensors]
        self.aliases = {name: self.index[target] for name, target in info.aliases.items()}
        self.fused = info.fused
        self.repeated: Repeated | None = None
        """What was given the last time that all tensors were given at once, under their own names."""

    def known(self, name: str) -> str:
        """The name that the engine knows a tensor by, where it is another one only for the trainer's wrappers."""
        if name in self.index or name in self.fused or name in self.aliases:
            return name
        return unwrapped(name)

    def parts(self, name: str, whole: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
        """Rows of the manifest that a fused tensor holds, each with its part of it."""
        fused = self.fused[name]
        rows = [self.index[part] for part in fused.parts]
        return [(row, fused.view(whole, i, self.shapes[row])) for i, row in enumerate(rows)]

    def similar(self, names: list[str]) -> dict[str, str]:
        """For the first few of `names`, the known name that each was probably meant to be."""
        known = [*self.index, *self.aliases, *self.fused]
        hints: dict[str, str] = {}
        budget = _HINT_WORK
        for name in names[:_HINTED]:
            suffix = next((k for k in known if name.endswith("." + k)), None)
            if suffix is not None:
                hints[name] = suffix
            elif budget >= len(known):
                budget -= len(known)
                for near in difflib.get_close_matches(name, known, n=1):
                    hints[name] = near
        return hints


@dataclass(slots=True)
class Selection:
    """Rows of the manifest and where their bytes come from, as one call gave them."""

    casts: list[tuple[str, str, str]] = field(default_factory=list)
    """Name, dtype got, dtype of the engine."""
    num_tensors: int = 0
    """Tensors that the trainer gave, aliases and fused ones counted once each."""
    addresses: np.ndarray | None = None
    """Of the tensors as `as_given` has them, uint64, where they are known."""
    layouts: object = None
    """What is the same object for two selections has the same rows, and tensors that differ in addresses alone; None:
    nothing is known."""
    _sources: dict[int, torch.Tensor] = field(default_factory=dict)
    _all: tuple[np.ndarray, list[torch.Tensor]] | None = None
    """Instead of `_sources`, what `as_given` returns."""

    @property
    def sources(self) -> dict[int, torch.Tensor]:
        """By position in the manifest."""
        if self._all is not None:
            return dict(zip(self._all[0].tolist(), self._all[1], strict=True))
        return self._sources

    def as_given(self) -> tuple[np.ndarray, list[torch.Tensor]]:
        """Rows, int64, and the tensor of each, in the order in which they are known."""
        if self._all is not None:
            return self._all
        return np.array(list(self._sources), dtype=np.int64), list(self._sources.values())

    def in_order(self) -> tuple[np.ndarray, list[torch.Tensor]]:
        """The same, rows ascending."""
        rows, tensors = self.as_given()
        order = np.argsort(rows, kind="stable")
        if np.array_equal(order, np.arange(len(order))):
            return rows, tensors
        return rows[order], [tensors[i] for i in order.tolist()]


class Selector:
    """Takes named tensors for one session and remembers what it has had.

    `packed(i)` is the arena's view of row i, for a tied tensor whose twin was packed earlier; `ignored(names)` tells
    which unknown names have no counterpart here and may be left out.
    """

    def __init__(
        self,
        layout: Layout,
        *,
        cast: bool,
        packed: Callable[[int], torch.Tensor],
        ignored: Callable[[list[str]], frozenset[str]],
    ) -> None:
        self._layout = layout
        self._cast = cast
        self._packed = packed
        self._ignored = ignored
        self._origin: list[str | None] = [None] * len(layout.shapes)
        self._complete = False
        """No row is missing; False: not known."""
        self._unknown: list[str] = []
        self._problems: list[str] = []
        self._refused: set[int] = (
            set()
        )  # rows whose tensor came, and did not fit: not missing as well
        self._untouched = True

    def take(
        self, named_tensors: Iterable[tuple[str, torch.Tensor]], ahead: Ahead | None = None
    ) -> Selection:
        """Sort tensors into rows, collecting problems; `finish` raises them.

        `ahead` is told again and again of those that are as they were, while more of them are looked at.
        """
        known, whole = self._layout.repeated, self._untouched
        self._untouched = False
        if known is not None and whole and is_listed(named_tensors):
            found = known.tensors(named_tensors, ahead)
            if found is not None:
                return self._take_again(known, *found)
        selection = Selection()
        sources, origin = selection.sources, self._origin
        index, shapes, dtypes = self._layout.index, self._layout.shapes, self._layout.dtypes
        for item in named_tensors:
            name, tensor = checked_pair(item)
            selection.num_tensors += 1
            i = index.get(name)
            if (
                i is not None
                and origin[i] is None
                and type(tensor) in _PLAIN
                and tensor.dtype is dtypes[i]
                and not tensor.is_nested
                and tensor.shape == shapes[i]
                and tensor.layout is torch.strided
                and not tensor.is_meta
                and not is_nowhere(tensor)
            ):
                origin[i] = name
                sources[i] = tensor
            else:
                self._take_other(name, tensor, selection)
        if whole and len(sources) == selection.num_tensors == len(shapes) and not selection.casts:
            self._remember(sources)
        return selection

    def _take_again(
        self, known: Repeated, tensors: list[torch.Tensor], addresses: np.ndarray
    ) -> Selection:
        self._origin, self._complete = known.origin, True  # never written: no row is without one
        return Selection(
            addresses=addresses,
            num_tensors=len(tensors),
            layouts=known.same,
            _all=(known.rows, tensors),
        )

    def _remember(self, sources: dict[int, torch.Tensor]) -> None:
        """Every row came once, as it is and under a name of its own."""
        layout, rows = self._layout, list(sources)
        origin = self._origin
        if origin == [meta.name for meta in layout.manifest.tensors]:
            tensors = list(sources.values())
            layout.repeated = Repeated(
                names=[str(origin[row]) for row in rows],
                rows=np.array(rows, dtype=np.int64),
                guards=[
                    guard_of(tensors[first : first + _AT_ONCE])
                    for first in range(0, len(tensors), _AT_ONCE)
                ],
                origin=origin,
                dtypes=[layout.dtypes[row] for row in rows],
                shapes=[layout.shapes[row] for row in rows],
            )

    def finish(self, *, strict: bool) -> None:
        """Raise one `ManifestMismatch` with all that was wrong so far, and what is missing when `strict`."""
        ignored = self._ignored(self._unknown) if self._unknown else frozenset()
        unknown = [name for name in self._unknown if name not in ignored]
        hints = self._layout.similar(unknown)
        problems = self._problems + [
            f"{name[:200]}: unknown to the engine"
            + (f"; did you mean {hints[name]}?" if name in hints else "")
            for name in unknown
        ]
        if strict and not self._complete and None in self._origin:
            missing = list(self._missing())
            if unknown and len(missing) == len(self._origin) > 1:  # other names, or another model
                problems.append(
                    f"all {len(missing)} of the engine's, such as {missing[0]}: missing"
                )
            else:
                problems += [f"{meta}: missing" for meta in missing]
        if problems:
            count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
            raise mismatch(
                f"{count} with the trainer's tensors; nothing was written",
                problems,
                "send Hugging Face names in the engine's shapes, each once"
                + (", all of them (strict=False allows a part)" if strict else ""),
            )

    def _missing(self) -> Iterator[Any]:
        tensors = self._layout.manifest.tensors
        for i, (meta, origin) in enumerate(zip(tensors, self._origin, strict=True)):
            if origin is None and i not in self._refused:
                yield meta

    def _take_other(self, name: str, tensor: torch.Tensor, selection: Selection) -> None:
        layout = self._layout
        name = layout.known(name)
        fused = layout.fused.get(name)
        if fused is not None:
            i, shape = layout.index[fused.parts[0]], fused.shape
        else:
            found = layout.index.get(name, layout.aliases.get(name))
            if found is None:
                self._unknown.append(name)
                return
            i, shape = found, layout.shapes[found]
        if not self._fits(name, tensor, shape, layout.dtypes[i], selection):
            self._refused |= {i} if fused is None else {layout.index[part] for part in fused.parts}
            return
        held = tensor.detach()
        for row, part in [(i, held)] if fused is None else layout.parts(name, held):
            self._place(row, name, part, selection)

    def _fits(
        self,
        name: str,
        tensor: torch.Tensor,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        selection: Selection,
    ) -> bool:
        if hasattr(tensor, "full_tensor"):
            self._problems.append(
                f"{name}: got a distributed tensor, expected a plain one; pass tensor.full_tensor(), which every "
                "rank must call"
            )
        elif (why := unreadable(tensor)) is not None:
            self._problems.append(f"{name}: got a tensor {why}, expected a dense one with data")
        elif tuple(tensor.shape) != shape:
            self._problems.append(f"{name}: got shape {list(tensor.shape)}, expected {list(shape)}")
        elif tensor.dtype == dtype:
            return True
        elif QUANTISED & {tensor.dtype, dtype}:
            self._problems.append(
                f"{name}: got {dtype_name(tensor.dtype)}, expected {dtype_name(dtype)}; a cast to or from a quantised "
                "dtype needs the tensor's scale: convert it in the trainer"
            )
        elif self._cast and tensor.dtype.is_floating_point and dtype.is_floating_point:
            selection.casts.append((name, dtype_name(tensor.dtype), dtype_name(dtype)))
            return True
        else:
            advice = "cast it first" if self._cast else "allow it with cast=True"
            self._problems.append(
                f"{name}: got {dtype_name(tensor.dtype)}, expected {dtype_name(dtype)}; {advice}"
            )
        return False

    def _place(self, i: int, name: str, tensor: torch.Tensor, selection: Selection) -> None:
        origin = self._origin[i]
        if origin is None:
            self._origin[i] = name
            selection.sources[i] = tensor
        elif origin == name:
            self._problems.append(f"{name}: sent more than once")
        else:
            twin = selection.sources.get(i)
            if not _same_bytes(
                tensor, self._packed(i) if twin is None else twin, self._layout.dtypes[i]
            ):
                self._problems.append(
                    f"{name}: differs from {origin}, which is the same tensor in this model (tied weights); send "
                    "one of them, or equal values"
                )


def _columns(listed: Listed) -> tuple[list[Any], list[Any]] | None:
    """Names and tensors, without a look at them; None where something is no pair."""
    if isinstance(listed, ItemsView):
        return list(listed.mapping), list(listed.mapping.values())  # type: ignore[attr-defined]
    if set(map(type, listed)) != {tuple}:
        return None
    try:
        return [name for name, _ in listed], [tensor for _, tensor in listed]
    except ValueError:
        return None


def _same_bytes(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether both are the same once they are held in `dtype`."""
    if (a.data_ptr(), a.stride(), a.dtype, a.device) == (
        b.data_ptr(),
        b.stride(),
        b.dtype,
        b.device,
    ):
        return True

    def raw(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().to("cpu", dtype).contiguous().reshape(-1).view(torch.uint8)

    return torch.equal(raw(a), raw(b))
