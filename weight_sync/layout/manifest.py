"""What an arena holds and where: names, shapes, dtypes, and the byte layout that follows from them.

Every tensor starts on a 256-byte boundary, in the order of the manifest, so any dtype can be viewed in place. Offsets
follow from the metadata alone: both ends compute the same layout, and compare digests instead of offsets.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Annotated, Self

import msgspec
import torch

from ..errors import ManifestMismatch

ALIGNMENT = 256
"""Bytes; every tensor of an arena starts on a multiple of it."""

MAX_TENSORS = 1_000_000
MAX_NAME_LENGTH = 512
MAX_DIMS = 32
MAX_ARENA_BYTES = 2**48
MAX_LISTED_PROBLEMS = 1_000

DTYPES: dict[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.float8_e4m3fnuz,
        torch.float8_e5m2fnuz,
        torch.float8_e8m0fnu,
        torch.complex64,
        torch.complex128,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint64,
        torch.uint32,
        torch.uint16,
        torch.uint8,
        torch.bool,
    )
}
"""The dtypes that travel, by the name that they have on the wire."""

QUANTISED = frozenset(
    dtype for dtype in DTYPES.values() if dtype.is_floating_point and dtype.itemsize == 1
)
"""Values of these mean something together with a scale alone: a plain cast clips them, or loses the scale."""


def parse_dtype(name: str) -> torch.dtype:
    """The dtype called `name`, with or without `torch.`; `ManifestMismatch` for any other string."""
    dtype = DTYPES.get(name.removeprefix("torch."))
    if dtype is None:
        raise ManifestMismatch(
            f"cannot read a dtype: got {name!r}, expected one of {', '.join(DTYPES)}; "
            "send the tensor in one of these"
        )
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """The name of `dtype` on the wire, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def mismatch(summary: str, problems: Sequence[str], advice: str) -> ManifestMismatch:
    """One error that lists all `problems` (the first thousand, then a count), one a line, and ends with `advice`."""
    listed = [f"  {problem}" for problem in problems[:MAX_LISTED_PROBLEMS]]
    if len(problems) > len(listed):
        listed.append(f"  ... and {len(problems) - len(listed)} more")
    return ManifestMismatch("\n".join([f"{summary}:", *listed, advice]))


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorMeta:
    """Name, shape and dtype of one tensor."""

    name: str
    """Its Hugging Face name."""
    shape: tuple[int, ...]
    """Sizes of its dimensions; empty for a scalar."""
    dtype: torch.dtype
    """Type of its elements."""

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor) -> Self:
        """The metadata of `tensor` under `name`."""
        return cls(name=name, shape=tuple(tensor.shape), dtype=tensor.dtype)

    @property
    def num_elements(self) -> int:
        """Product of the shape."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes of the elements, without padding."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.name} {dtype_name(self.dtype)} {list(self.shape)}"


class WireManifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A manifest as it travels, in columns; decoding checks the types and bounds, `Manifest.from_wire` the rest."""

    names: Annotated[
        tuple[Annotated[str, msgspec.Meta(max_length=MAX_NAME_LENGTH)], ...],
        msgspec.Meta(max_length=MAX_TENSORS),
    ]
    """Names of the tensors, in layout order."""
    shapes: Annotated[
        tuple[
            Annotated[
                tuple[Annotated[int, msgspec.Meta(ge=0, lt=MAX_ARENA_BYTES)], ...],
                msgspec.Meta(max_length=MAX_DIMS),
            ],
            ...,
        ],
        msgspec.Meta(max_length=MAX_TENSORS),
    ]
    """Their shapes."""
    dtypes: Annotated[
        tuple[Annotated[str, msgspec.Meta(max_length=32)], ...],
        msgspec.Meta(max_length=MAX_TENSORS),
    ]
    """Their dtypes, such as "bfloat16"."""
    bucket_bytes: Annotated[int, msgspec.Meta(ge=1, lt=MAX_ARENA_BYTES)]
    """Largest bucket, bytes."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The layout of one arena; validated when it is built, equal on every rank and at both ends."""

    tensors: tuple[TensorMeta, ...]
    """What the arena holds, in layout order."""
    bucket_bytes: int
    """Most bytes of the arena that one bucket spans, unless a single tensor is larger."""

    def __post_init__(self) -> None:
        problems = list(_problems(self.tensors, self.bucket_bytes))
        if not problems and self.arena_bytes >= MAX_ARENA_BYTES:
            problems.append(f"arena: got {self.arena_bytes} bytes, expected less than 2**48")
        if problems:
            raise mismatch(
                "not a valid manifest", problems, "name every tensor once, with its real shape"
            )

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each tensor starts in the arena, bytes."""
        return self._bounds[:-1]

    @property
    def arena_bytes(self) -> int:
        """Bytes of the arena; a multiple of 256."""
        return self._bounds[-1]

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of all tensors, without padding."""
        return sum(meta.num_bytes for meta in self.tensors)

    @cached_property
    def index(self) -> dict[str, int]:
        """Position of each tensor, by name."""
        return {meta.name: i for i, meta in enumerate(self.tensors)}

    @cached_property
    def digest(self) -> str:
        """Identity of the layout: SHA-256, in hex, of a canonical encoding of everything here."""
        rows = [[meta.name, list(meta.shape), dtype_name(meta.dtype)] for meta in self.tensors]
        text = json.dumps(
            ["manifest", 1, ALIGNMENT, self.bucket_bytes, rows], separators=(",", ":")
        )
        return hashlib.sha256(text.encode()).hexdigest()

    @cached_property
    def buckets(self) -> tuple[range, ...]:
        """Runs of tensor indices that span at most `bucket_bytes`; a larger tensor is alone in its bucket."""
        buckets: list[range] = []
        first = 0
        for i in range(len(self.tensors)):
            if i > first and self._bounds[i + 1] - self._bounds[first] > self.bucket_bytes:
                buckets.append(range(first, i))
                first = i
        if self.tensors:
            buckets.append(range(first, len(self.tensors)))
        return tuple(buckets)

    def view(self, buffer: torch.Tensor, i: int) -> torch.Tensor:
        """Tensor `i` as a typed view into `buffer` (uint8, on any device, at least `arena_bytes` long)."""
        meta, start = self.tensors[i], self._bounds[i]
        return buffer[start : start + meta.num_bytes].view(meta.dtype).view(meta.shape)

    def views(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        """All tensors as typed views into `buffer`; keep the list, making it costs microseconds per tensor."""
        return [self.view(buffer, i) for i in range(len(self.tensors))]

    def to_wire(self) -> WireManifest:
        """The same as a message."""
        return WireManifest(
            names=tuple(meta.name for meta in self.tensors),
            shapes=tuple(tuple(meta.shape) for meta in self.tensors),
            dtypes=tuple(dtype_name(meta.dtype) for meta in self.tensors),
            bucket_bytes=self.bucket_bytes,
        )

    @classmethod
    def from_wire(cls, wire: WireManifest) -> Self:
        """The manifest that `wire` describes; `ManifestMismatch` when it describes none."""
        lengths = {len(wire.names), len(wire.shapes), len(wire.dtypes)}
        if len(lengths) != 1:
            raise ManifestMismatch(
                f"cannot read a manifest: got {len(wire.names)} names, {len(wire.shapes)} shapes and "
                f"{len(wire.dtypes)} dtypes, expected as many of each; build it with Manifest.to_wire"
            )
        dtypes = {name: parse_dtype(name) for name in set(wire.dtypes)}
        columns = zip(wire.names, wire.shapes, wire.dtypes, strict=True)
        return cls(
            tensors=tuple(
                TensorMeta(name=name, shape=shape, dtype=dtypes[dtype])
                for name, shape, dtype in columns
            ),
            bucket_bytes=wire.bucket_bytes,
        )

    @cached_property
    def _bounds(self) -> tuple[int, ...]:
        """`offsets` and, last, `arena_bytes`."""
        return tuple(accumulate((align(meta.num_bytes) for meta in self.tensors), initial=0))


def align(num_bytes: int) -> int:
    """`num_bytes` rounded up to the alignment of an arena."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def _problems(tensors: Sequence[TensorMeta], bucket_bytes: int) -> Iterator[str]:
    if not 1 <= bucket_bytes < MAX_ARENA_BYTES:
        yield f"bucket_bytes: got {bucket_bytes}, expected 1 to 2**48 - 1"
    if len(tensors) > MAX_TENSORS:
        yield f"tensors: got {len(tensors)}, expected at most {MAX_TENSORS}"
        return
    for name, count in Counter(meta.name for meta in tensors).items():
        if count > 1:
            yield f"{name[:MAX_NAME_LENGTH]}: got it {count} times, expected once"
    for meta in tensors:
        yield from _meta_problems(meta)


def _meta_problems(meta: TensorMeta) -> Iterable[str]:
    if not 0 < len(meta.name) <= MAX_NAME_LENGTH:
        yield (
            f"{meta.name[:80]!r}: got a name of {len(meta.name)} characters, "
            f"expected 1 to {MAX_NAME_LENGTH}"
        )
    if any(size < 0 for size in meta.shape) or len(meta.shape) > MAX_DIMS:
        yield (
            f"{meta.name[:80]}: got shape {list(meta.shape[: MAX_DIMS + 1])}, "
            f"expected at most {MAX_DIMS} sizes, none negative"
        )
    if DTYPES.get(dtype_name(meta.dtype)) is not meta.dtype:
        yield f"{meta.name[:80]}: got dtype {meta.dtype}, expected one of {', '.join(DTYPES)}"
