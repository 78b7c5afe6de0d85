"""The call that every rank of a trainer makes: `await weight_sync.update_weights(...)`."""

import asyncio
from collections.abc import Iterable
from typing import Any

import torch

from .errors import TransportError
from .report import SyncReport


async def update_weights(
    engine: Any,
    params_batch: Iterable[tuple[str, torch.Tensor]],
    device_mesh_key: str | None,
    device_mesh: Any,
    load_format: str | None = None,
) -> SyncReport:
    """Update `engine` with a batch of plain (name, tensor) pairs, in the open session if there is one.

    Called by every rank along `device_mesh[device_mesh_key]`; today that is one rank, or no mesh at all (None), and
    a larger mesh is refused. `load_format` None and "flattened_bucket" mean the same here: how the bytes travel is the
    publisher's business, and none of them is packed twice.
    """
    if load_format not in (None, "auto", "flattened_bucket"):
        raise ValueError(
            f"load_format: got {load_format!r}, expected None, 'auto' or 'flattened_bucket'; leave it out"
        )
    size = _mesh_size(device_mesh, device_mesh_key)
    if size != 1:
        raise TransportError(
            f"cannot gather from a device mesh: got {size} ranks along {device_mesh_key!r}, expected one; gather the "
            "tensors with full_tensor() on every rank and publish them from one"
        )
    pairs = list(params_batch)
    twin = getattr(engine, "async_update_weights_from_tensor", None)
    if twin is not None:
        report: SyncReport = await twin(pairs)
    else:
        report = await asyncio.to_thread(engine.update_weights_from_tensor, pairs)
    return report


def _mesh_size(device_mesh: Any, key: str | None) -> int:
    if device_mesh is None:
        return 1
    along = device_mesh if key is None else device_mesh[key]
    return int(along.size())
