"""A device mesh as a row of ranks, and the one collective that publishing needs: everybody learns of rank 0."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ..errors import DeadlineExceeded, TransportError

_MAX_BYTES = 1024


class MeshRanks:
    """All ranks of a `DeviceMesh`, counted row by row; of None, this process alone.

    `axis` names the mesh dimension along which one engine is served: its first rank brings the engine. None, or a mesh
    of one dimension: rank 0 does.
    """

    def __init__(self, mesh: Any, axis: str | None = None) -> None:
        self._mesh = mesh
        self.rank, self.size, self.is_owner = 0, 1, True
        if mesh is None:
            return
        coordinate = mesh.get_coordinate()
        if coordinate is None:
            raise TransportError(
                f"not a rank of the mesh: got rank {dist.get_rank()}, expected one of {mesh.mesh.tolist()}; call this "
                "on the mesh's ranks alone"
            )
        for at, size in zip(coordinate, mesh.mesh.shape, strict=True):
            self.rank = self.rank * size + at
        self.size = mesh.size()
        self.is_owner = self.rank == 0
        if axis is not None and mesh.ndim > 1:
            names = mesh.mesh_dim_names or ()
            if axis not in names:
                raise ValueError(
                    f"device_mesh_key: got {axis!r}, expected one of {list(names)}; name a dimension of the mesh"
                )
            self.is_owner = coordinate[names.index(axis)] == 0

    def from_first(self, payload: bytes, timeout_s: float) -> bytes:
        """What rank 0 gave; every rank calls it. One broadcast of a kilobyte along every axis, in their order."""
        if self._mesh is None:
            return payload
        if len(payload) > _MAX_BYTES - 2:
            raise ValueError(f"got {len(payload)} bytes, expected at most {_MAX_BYTES - 2}")
        raw = len(payload).to_bytes(2, "little") + payload
        buffer = torch.zeros(_MAX_BYTES, dtype=torch.uint8)
        buffer[: len(raw)] = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
        buffer = buffer.to(self._mesh.device_type)
        for axis in range(self._mesh.ndim):
            # After axis 0, rank 0's line along axis 1 is right everywhere it starts from, and so on.
            group = self._mesh.get_group(axis)
            work = dist.broadcast(buffer, group=group, group_src=0, async_op=True)
            try:
                work.wait(timeout=timedelta(seconds=timeout_s))
            except RuntimeError as error:
                raise DeadlineExceeded(
                    f"the ranks of the mesh did not meet within {timeout_s:.1f} s: {error}; expected every rank to "
                    "make its publisher at the same point; look at what keeps them"
                ) from error
        data = bytes(buffer.cpu().numpy())
        return data[2 : 2 + int.from_bytes(data[:2], "little")]
