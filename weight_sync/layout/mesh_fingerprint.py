"""Fingerprints of DTensors: every rank counts its own shards, and one number per mesh is added up."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from . import region as regions
from .fused import Fused
from .region import Region
from .shards import held_regions, is_first_replica, local_of
from .spellings import stacked_experts
from .tensor_sums import name_key, region_sum, unsigned

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


class MeshSums:
    """Collects the summands of this rank; `total` is a collective of every mesh that occurred, in their order."""

    def __init__(self) -> None:
        self._sums: dict[Any, int] = {}

    def add(self, name: str, tensor: DTensor, dtype: torch.dtype) -> None:
        """Count this rank's shards of `tensor`, which stand in `dtype`; of replicas, only the first does."""
        mesh = tensor.device_mesh
        total = 0
        pieces = held_regions(name, tensor)
        if is_first_replica(tensor):
            local = local_of(tensor).to(dtype)
            fused = stacked_experts(name, tensor.shape)
            for piece in pieces:
                part = regions.part(local, piece.local)
                if fused is None:
                    value = unsigned(region_sum(part, tuple(tensor.shape), piece.region))
                    total += name_key(name) * value
                else:
                    total += _experts_sum(part, piece.region, fused)
        self._sums[mesh] = self._sums.get(mesh, 0) + total

    def total(self) -> int:
        """The sum over all ranks and meshes; one 8-byte all_reduce along every axis of each mesh."""
        total = 0
        for mesh, value in self._sums.items():
            # As two's complement: sums modulo 2^64 are what integer reductions give.
            wrapped = (value + (1 << 63)) % (1 << 64) - (1 << 63)
            box = torch.tensor([wrapped], dtype=torch.int64, device=mesh.device_type)
            for axis in range(mesh.ndim):
                dist.all_reduce(box, group=mesh.get_group(axis))
            total += unsigned(box[0])
        return total


def _experts_sum(held: torch.Tensor, region: Region, fused: Fused) -> int:
    """The summands of all matrices of which `held`, the part `region` of their stack, has some rows."""
    num_experts, rows, columns = fused.shape
    size = (rows * num_experts // len(fused.parts), columns)
    total = 0
    for i, name in enumerate(fused.parts):
        place = fused.region(i, regions.whole(size))
        both = regions.common(region, place)
        if both is not None:
            own = regions.counted_from(both, place)[1:]
            part = regions.part(held, regions.counted_from(both, region))[0]
            total += name_key(name) * unsigned(region_sum(part, size, own))
    return total
