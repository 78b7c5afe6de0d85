"""The call that every rank of a trainer makes: `await weight_sync.update_weights(...)`."""

import asyncio
import threading
from collections.abc import Iterable
from typing import Any

import torch

from ..report import SyncReport
from ..wire.cancellation import on_a_thread
from .handover import HandOver
from .publisher import SpmdPublisher

_LOCK = threading.Lock()
_PUBLISHERS: dict[tuple[Any, str | None], SpmdPublisher] = {}
"""One per mesh and key, made by its ranks together and kept: arena and plan serve every later batch."""


async def update_weights(
    engine: Any,
    params_batch: Iterable[tuple[str, torch.Tensor]],
    device_mesh_key: str | None,
    device_mesh: Any,
    load_format: str | None = None,
) -> SyncReport:
    """Update `engine` with a batch of (name, tensor or DTensor) pairs, of any part of the model.

    Called by every rank of `device_mesh` at the same point, with its own shards; plain tensors count as replicated.
    `engine` is an engine or its address, and counts on the first rank along `device_mesh_key` alone: one engine per
    line of the mesh, all with the same weights. Every rank returns the report of its engine, or raises the same error.

    Each batch is a transaction of its own, unless the engine's explicit session is open: then it is staged there, by
    the engine's own call. So are batches of a trainer of one rank (no mesh, or a mesh of size 1), and all batches for
    objects that have nothing but `update_weights_from_tensor`, awaitable or not. `load_format` None, "auto" and
    "flattened_bucket" mean the same: no byte is packed twice by any of them.

    The first call on a mesh makes a publisher that later ones use; `close_mesh` gives it back.
    """
    if load_format not in (None, "auto", "flattened_bucket"):
        raise ValueError(
            f"load_format: got {load_format!r}, expected None, 'auto' or 'flattened_bucket'; leave it out"
        )
    if device_mesh is None or device_mesh.size() == 1:
        return await _update_alone(engine, list(params_batch))
    publisher = await on_a_thread(_publisher, device_mesh, device_mesh_key)
    return await publisher.async_publish(params_batch, _target(engine), strict=False)


def close_mesh(device_mesh: Any) -> None:
    """Give back what `update_weights` keeps for a mesh. On every rank, before the process group is destroyed or not."""
    with _LOCK:
        keys = [key for key in _PUBLISHERS if key[0] == device_mesh]
        publishers = [_PUBLISHERS.pop(key) for key in keys]
    for publisher in publishers:
        publisher.close()


async def _update_alone(engine: Any, pairs: list[tuple[str, torch.Tensor]]) -> SyncReport:
    twin = getattr(engine, "async_update_weights_from_tensor", None)
    if twin is not None:
        report: SyncReport = await twin(pairs)
    elif hasattr(engine, "update_weights_from_tensor"):
        report = await on_a_thread(engine.update_weights_from_tensor, pairs)
    else:
        with SpmdPublisher(None) as publisher:
            report = await publisher.async_publish(pairs, engine, strict=False)
    return report


def _target(engine: Any) -> Any:
    """What the publisher is to drive: the engine itself, or its own call."""
    if engine is None or isinstance(engine, str):
        return engine
    if hasattr(engine, "weight_channel") and not getattr(engine, "in_weight_update", False):
        return engine
    return HandOver(engine=engine, loop=asyncio.get_running_loop())


def _publisher(device_mesh: Any, key: str | None) -> SpmdPublisher:
    with _LOCK:
        found = _PUBLISHERS.get((device_mesh, key))
        if found is None:
            found = SpmdPublisher(device_mesh, engine_axis=key)
            _PUBLISHERS[device_mesh, key] = found
        return found
