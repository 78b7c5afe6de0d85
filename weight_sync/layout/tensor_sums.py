"""The fingerprint of one tensor or of a part of it, and how many add up; `rollout_kernels.fingerprint` has the sum."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from functools import lru_cache

import torch

from rollout_kernels.span_table import part_sum

from ..errors import ManifestMismatch
from . import region as regions
from .region import Region

MASK = (1 << 64) - 1


@lru_cache(maxsize=1 << 16)
def name_key(name: str) -> int:
    """The odd 64-bit key of a tensor's name: the first eight bytes of its SHA-256, little-endian, lowest bit set."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") | 1


def combine(names: Iterable[str], values: torch.Tensor | Iterable[int]) -> int:
    """The model fingerprint of tensors whose own values are `values` (int64 tensor, or integers of either sign)."""
    if isinstance(values, torch.Tensor):
        values = values.tolist()
    pairs = zip(names, values, strict=True)
    return sum(name_key(name) * value for name, value in pairs) & MASK


def unsigned(value: torch.Tensor | int) -> int:
    """A fingerprint that torch keeps as int64, as the 64-bit number that it is."""
    return int(value) & MASK


def tensor_fingerprint(
    tensor: torch.Tensor, *, shape: Sequence[int] | None = None, region: Region | None = None
) -> int:
    """The fingerprint of a tensor of any layout, on any device; or, with `shape` and `region`, what a shard adds to
    the fingerprint of the whole tensor of that shape."""
    shape = tuple(tensor.shape) if shape is None else tuple(shape)
    region = regions.whole(shape) if region is None else region
    if regions.sizes(region) != tuple(tensor.shape) or not regions.inside(region, shape):
        raise ManifestMismatch(
            f"cannot fingerprint a shard: got shape {list(tensor.shape)}, expected the shape of region "
            f"{region} of a tensor {list(shape)}; pass the whole tensor's shape and the shard's region"
        )
    return unsigned(region_sum(tensor, shape, region))


def region_sum(tensor: torch.Tensor, shape: Sequence[int], region: Region) -> torch.Tensor:
    """What the part `tensor` adds to the fingerprint of a tensor of `shape`; 0-d int64 on its device."""
    starts, run_bytes = regions.runs(shape, region, tensor.element_size())
    return part_sum(tensor, starts, run_bytes)
