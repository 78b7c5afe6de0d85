"""One contiguous byte buffer that carries many named tensors: what trainers call a flattened bucket.

Buckets made here lay tensors out as an arena does, each on a 256-byte boundary, so that any dtypes mix. Buckets made
elsewhere are read too: offsets come from their metadata, in bytes or, from older senders, in elements, and without
padding; where a tensor's bytes do not start on a multiple of its element they are copied.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import ManifestMismatch
from .manifest import MAX_DIMS, Manifest, TensorMeta, dtype_name, mismatch, parse_dtype
from .named_tensors import NamedTensors, pairs_of, readable_pair


@dataclass(frozen=True, slots=True, kw_only=True)
class FlattenedTensorMetadata:
    """Where one tensor lies in a bucket, and what it is."""

    name: str
    """Its Hugging Face name."""
    shape: torch.Size
    """Its shape."""
    dtype: torch.dtype
    """Type of its elements."""
    start_idx: int
    """First byte in the bucket."""
    end_idx: int
    """One past its last byte."""
    numel: int
    """Bytes of the tensor, as the existing senders of this layout count; in their older form, elements."""


class FlattenedTensorBucket:
    """A bucket, from named tensors (`named_tensors=`) or from its parts (`flattened_tensor=` and `metadata=`).

    With `named_tensors` the values are copied when the bucket is made, so an iterator may reuse its memory; they must
    be on one device. An empty bucket is valid: it is what a rank with nothing to send ships.
    """

    def __init__(
        self,
        named_tensors: NamedTensors | None = None,
        flattened_tensor: torch.Tensor | None = None,
        metadata: Sequence[Any] | None = None,
    ) -> None:
        """`metadata`: `FlattenedTensorMetadata`, or any objects or mappings with its fields, dtypes also as strings.

        Raises `ManifestMismatch`, listing all that is wrong, when the parts do not fit together.
        """
        if (named_tensors is None) == (flattened_tensor is None and metadata is None):
            raise ValueError(
                "a bucket is made from named_tensors, or from flattened_tensor and metadata: got "
                f"{'neither' if named_tensors is None else 'both'}, expected one of the two; drop the other"
            )
        if named_tensors is not None:
            self._flattened, self._metadata = _pack(named_tensors)
            self._places = [(m.start_idx, m.end_idx) for m in self._metadata]
            return
        if flattened_tensor is None or metadata is None:
            raise ValueError(
                "half a bucket: got only one of flattened_tensor and metadata, expected both; "
                "an empty bucket is an empty tensor and an empty list"
            )
        if not isinstance(flattened_tensor, torch.Tensor) or not isinstance(metadata, Iterable):
            raise ManifestMismatch(
                f"a bucket: got flattened_tensor of {type(flattened_tensor).__name__} and metadata of "
                f"{type(metadata).__name__}, expected a tensor and a list with an entry for each of its tensors"
            )
        readable_pair(("flattened_tensor", flattened_tensor))
        self._flattened = flattened_tensor
        self._metadata, self._places = _read_metadata(metadata, flattened_tensor)

    def get_flattened_tensor(self) -> torch.Tensor:
        """The bytes, uint8 and 1-d where this class packed them; shared, not copied."""
        return self._flattened

    def get_metadata(self) -> list[FlattenedTensorMetadata]:
        """One entry per tensor, in the order of the bytes."""
        return list(self._metadata)

    def reconstruct_tensors(self) -> list[tuple[str, torch.Tensor]]:
        """The named tensors as views that alias the bucket; a copy where one does not start on its element's size.

        Valid as long as the bucket's memory is not reused.
        """
        if not self._metadata:
            return []
        raw = self._flattened.detach().flatten().view(torch.uint8)
        return [
            (meta.name, _typed(raw[start:end], meta.dtype).view(meta.shape))
            for meta, (start, end) in zip(self._metadata, self._places, strict=True)
        ]


def as_bucket(value: Any) -> FlattenedTensorBucket | None:
    """A bucket, as it is or made of a mapping of its two parts; None for anything else."""
    if isinstance(value, Mapping) and {"flattened_tensor", "metadata"} <= value.keys():
        return FlattenedTensorBucket(
            flattened_tensor=value["flattened_tensor"], metadata=value["metadata"]
        )
    return value if isinstance(value, FlattenedTensorBucket) else None


def _typed(raw: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if raw.storage_offset() % dtype.itemsize:
        raw = raw.clone()
    return raw.view(dtype)


@torch.no_grad()
def _pack(named: NamedTensors) -> tuple[torch.Tensor, list[FlattenedTensorMetadata]]:
    """One buffer with every tensor at its place in an arena, cut after the last byte of the last tensor."""
    given = pairs_of(named)
    reused = not isinstance(
        given, Sequence
    )  # what an iterator hands out its next item may overwrite
    pairs = [
        (name, tensor.detach().clone() if reused else tensor)
        for name, tensor in map(readable_pair, given)
    ]
    devices = {tensor.device for _, tensor in pairs}
    if len(devices) > 1:
        raise ManifestMismatch(
            f"one bucket is on one device: got tensors on {sorted(map(str, devices))}, "
            "expected one; make a bucket per device"
        )
    metas = tuple(TensorMeta.of(name, tensor) for name, tensor in pairs)
    manifest = Manifest(tensors=metas, bucket_bytes=1)
    size = manifest.offsets[-1] + metas[-1].num_bytes if metas else 0
    device = devices.pop() if devices else torch.device("cpu")
    buffer = torch.zeros(size, dtype=torch.uint8, device=device)
    if pairs:
        torch._foreach_copy_(manifest.views(buffer), [tensor.detach() for _, tensor in pairs])
    places = [
        FlattenedTensorMetadata(
            name=meta.name,
            shape=torch.Size(meta.shape),
            dtype=meta.dtype,
            start_idx=start,
            end_idx=start + meta.num_bytes,
            numel=meta.num_bytes,
        )
        for meta, start in zip(metas, manifest.offsets, strict=True)
    ]
    return buffer, places


def _read_metadata(
    entries: Sequence[Any], flattened: torch.Tensor
) -> tuple[list[FlattenedTensorMetadata], list[tuple[int, int]]]:
    """The entries, and the bytes that each one means."""
    problems: list[str] = []
    metas: list[FlattenedTensorMetadata] = []
    for number, entry in enumerate(entries):
        try:
            metas.append(_entry(entry))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            problems.append(f"entry {number}: {error}")
    unit = _unit(metas, flattened.dtype)
    places = [(meta.start_idx * unit, meta.end_idx * unit) for meta in metas]
    total = flattened.numel() * flattened.element_size()
    for meta, (start, end) in zip(metas, places, strict=True):
        size = math.prod(meta.shape) * meta.dtype.itemsize
        if not 0 <= start <= end <= total:
            problems.append(
                f"{meta.name}: got bytes {start} to {end}, expected them within 0 to {total}"
            )
        elif end - start != size:
            problems.append(
                f"{meta.name}: got {end - start} bytes, expected {size} for "
                f"{dtype_name(meta.dtype)} {list(meta.shape)}"
            )
    counts = Counter(meta.name for meta in metas)
    problems += [f"{name}: got it {n} times, expected once" for name, n in counts.items() if n > 1]
    filled = sorted((place, meta.name) for place, meta in zip(places, metas, strict=True))
    for ((_, end), name), ((start, stop), other) in itertools.pairwise(filled):
        if start < end and start < stop:
            problems.append(f"{other}: got bytes that {name} holds as well, expected its own")
    if problems:
        raise mismatch(
            "the bucket and its metadata do not fit",
            problems,
            "send flattened_tensor and metadata of the same bucket",
        )
    return metas, places


def _unit(metas: Sequence[FlattenedTensorMetadata], dtype: torch.dtype) -> int:
    """Bytes per count of `start_idx` and `end_idx`: 1, or an element's size where every tensor spans its elements."""
    sizes = {meta.dtype.itemsize for meta in metas if math.prod(meta.shape)}
    in_elements = all(meta.end_idx - meta.start_idx == math.prod(meta.shape) for meta in metas)
    if not in_elements or len(sizes) != 1:
        return 1
    return sizes.pop() if dtype in (torch.uint8, torch.int8) else dtype.itemsize


def _entry(entry: Any) -> FlattenedTensorMetadata:
    """The fields of an object or a mapping, checked."""

    def field(name: str) -> Any:
        return entry[name] if isinstance(entry, Mapping) else getattr(entry, name)

    name, dtype, shape = field("name"), field("dtype"), tuple(field("shape"))
    start, end = field("start_idx"), field("end_idx")
    if not isinstance(name, str):
        raise TypeError(f"got a name of type {type(name).__name__}, expected str")
    if not all(type(size) is int and size >= 0 for size in shape) or len(shape) > MAX_DIMS:
        raise ValueError(f"{name[:80]}: got shape {shape!r:.200}, expected sizes of 0 or more")
    if type(start) is not int or type(end) is not int:
        raise TypeError(f"{name[:80]}: got places {start!r:.40}, {end!r:.40}, expected integers")
    if isinstance(dtype, str):
        dtype = parse_dtype(dtype)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name[:80]}: got dtype {dtype!r:.80}, expected a torch.dtype or its name")
    return FlattenedTensorMetadata(
        name=name,
        shape=torch.Size(shape),
        dtype=dtype,
        start_idx=start,
        end_idx=end,
        numel=end - start,
    )
