"""Which part of a tensor a trainer's rank holds: from a DTensor's placements to regions of the full tensor.

A plain tensor is all there, on every rank. A DTensor's local tensor is made of one piece or, where a dimension was cut
twice in an order that interleaves (FSDP over tensor parallelism), of several. Pieces follow from mesh and placements
alone: nothing is communicated.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

import torch

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

from ..errors import ManifestMismatch
from . import region as regions
from .memory import joined
from .named_tensors import NamedTensors, pairs_of, readable_pair
from .region import Region

Runs = list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class HeldRegion:
    """One rectangular part that a rank holds."""

    region: Region
    """Which part of the full tensor it is."""
    local: Region
    """Where it lies in the rank's own tensor."""


def is_distributed(tensor: torch.Tensor) -> TypeGuard[DTensor]:
    """Whether `tensor` is a DTensor; there is none before its module was imported, and this does not import it."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of it; no communication, no copy."""
    if not is_distributed(tensor):
        return tensor.detach()
    return tensor.to_local().detach()


def held_regions(name: str, tensor: torch.Tensor) -> tuple[HeldRegion, ...]:
    """What this rank's local tensor is made of; empty where it holds nothing.

    `ManifestMismatch` for placements that are no parts of the tensor (Partial), or that are not understood.
    """
    shape = tuple(tensor.shape)
    if not is_distributed(tensor):
        region = regions.whole(shape)
        return (HeldRegion(region, region),)
    mesh: Any = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return ()
    _refuse_reordered(name, tensor)
    runs = [[(0, size)] for size in shape]
    for axis, placement in enumerate(tensor.placements):
        if placement.is_replicate():
            continue
        dim = getattr(placement, "dim", None)
        if dim is None or placement.is_partial():
            raise ManifestMismatch(
                f"{name}: got placement {placement!r}, expected Shard or Replicate; reduce it first, for example with "
                "tensor.redistribute(placements=[Replicate()])"
            )
        factor = int(getattr(placement, "split_factor", 1))
        runs[dim] = share(runs[dim], factor, mesh.size(axis), coordinate[axis])
    pieces = _product(runs)
    held = tuple(sum(stop - start for start, stop in along) for along in runs)
    local = tuple(tensor.to_local().shape)
    if local != held:
        raise ManifestMismatch(
            f"{name}: got a local tensor {list(local)}, expected {list(held)} of {list(shape)} by its placements "
            f"{tensor.placements}; build it with distribute_tensor or fully_shard"
        )
    return pieces


def dense_pairs(named_tensors: NamedTensors) -> list[tuple[str, torch.Tensor]]:
    """Named tensors as a list; `ManifestMismatch` for what is none, or has no data of its own."""
    return [readable_pair(item) for item in pairs_of(named_tensors)]


def placement_of(tensor: torch.Tensor) -> object:
    """What tells one way of holding a tensor from another; None twice for a plain one."""
    return getattr(tensor, "placements", None), getattr(tensor, "device_mesh", None)


def is_first_replica(tensor: DTensor) -> bool:
    """Of the ranks that hold the same part of a DTensor, one: coordinate 0 along every axis that replicates."""
    coordinate = tensor.device_mesh.get_coordinate()
    placements = tensor.placements
    return coordinate is not None and all(
        at == 0 or not placement.is_replicate()
        for at, placement in zip(coordinate, placements, strict=True)
    )


def share(runs: Runs, factor: int, num_ranks: int, rank: int) -> Runs:
    """The elements of one rank when `runs`, in order, are cut into `factor` stretches and each of those over ranks.

    Cuts are those of `torch.chunk`: of equal length, rounded up, so that the last ones are shorter or empty.
    """
    total = sum(stop - start for start, stop in runs)
    stretch = -(-total // factor)
    taken: Runs = []
    for first in range(0, total, stretch or 1):
        length = min(stretch, total - first)
        chunk = -(-length // num_ranks)
        start = min(rank * chunk, length)
        stop = min(start + chunk, length)
        taken += _cut(runs, first + start, first + stop)
    return joined(taken)


def _cut(runs: Runs, first: int, last: int) -> Runs:
    """Elements `first` to `last` of the sequence that `runs` are."""
    found: Runs = []
    at = 0
    for start, stop in runs:
        low, high = max(first - at, 0), min(last - at, stop - start)
        if low < high:
            found.append((start + low, start + high))
        at += stop - start
    return found


def _product(runs: Sequence[Runs]) -> tuple[HeldRegion, ...]:
    """Every combination of one run per dimension, with its place in the local tensor."""
    located = []
    for along in runs:
        at, here = 0, []
        for start, stop in along:
            here.append(((start, stop), (at, at + stop - start)))
            at += stop - start
        located.append(here)
    return tuple(
        HeldRegion(tuple(full for full, _ in ranges), tuple(local for _, local in ranges))
        for ranges in itertools.product(*located)
    )


def _refuse_reordered(name: str, tensor: Any) -> None:
    """torch can cut one dimension over mesh axes in another order than theirs; only its private spec tells."""
    order = getattr(getattr(tensor, "_spec", None), "shard_order", None) or ()
    for entry in order:
        axes = tuple(getattr(entry, "mesh_dims", ()))
        if axes != tuple(sorted(axes)):
            raise ManifestMismatch(
                f"{name}: got dimension {entry.tensor_dim} cut over mesh axes in the order {axes}, expected ascending; "
                "redistribute it to plain placements first"
            )
