"""Engines that take whole tensors by a call of their own: the ranks put them together, rank 0 hands them over.

For an engine whose explicit session is open, and for other engines' objects. The layout is the trainer's: names and
dtypes go on as they are.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import TransportError
from ..layout.manifest import Manifest, TensorMeta, parse_dtype
from ..publisher.open_session import UpdateOptions
from ..report import SyncReport
from ..transports.shared_memory import SharedMemoryArena
from ..wire.deadline import Deadline
from ..wire.messages import PROTOCOL_VERSION, EngineInfo, SharedMemoryHandle
from ..wire.process import current_process
from .messages import Tensor
from .plan import Decision


@dataclass(frozen=True, slots=True, kw_only=True)
class HandOver:
    """An engine that has `update_weights_from_tensor(named_tensors)`, or the same with `async_` before it."""

    engine: Any
    """The object."""
    loop: asyncio.AbstractEventLoop | None = None
    """Where to await what the call returns; None: it is not awaitable."""


class HandingOver:
    """Rank 0's side of it, in the place of `Engines`. The views are valid during the call alone."""

    bucket_bytes = 512 << 20

    def __init__(self) -> None:
        self._arena: SharedMemoryArena | None = None
        self._num_bytes = 0
        self._manifest: Manifest | None = None
        self._target: HandOver | None = None
        self._label: str | None = None

    @property
    def handle(self) -> SharedMemoryHandle | None:
        """The arena that the ranks write."""
        return None if self._arena is None else self._arena.handle

    def connect(self, targets: Sequence[Any], deadline: Deadline) -> None:
        """There is one engine, and nothing to connect."""
        if len(targets) != 1:
            raise TransportError(
                f"cannot hand tensors over to {len(targets)} engines: expected one; bring it on rank 0 alone"
            )
        self._target = targets[0]

    def info(self, described: Sequence[Sequence[Tensor]], deadline: Deadline) -> EngineInfo:
        """The trainer's own tensors, as if an engine had asked for them."""
        merged = {tensor.name: tensor for tensors in described for tensor in tensors}
        metas = tuple(
            TensorMeta(name=name, shape=tensor.shape, dtype=parse_dtype(tensor.dtype))
            for name, tensor in merged.items()
        )
        manifest = Manifest(tensors=metas, bucket_bytes=self.bucket_bytes)
        if self._arena is None or manifest.arena_bytes > self._num_bytes:
            self.close()
            self._arena = SharedMemoryArena(manifest.arena_bytes)
            self._num_bytes = manifest.arena_bytes
        return EngineInfo(
            protocol=PROTOCOL_VERSION,
            process=current_process(),
            engine_id="",
            version=0,
            label=None,
            torn=None,
            manifest=manifest.to_wire(),
            aliases={},
            fused={},
            device="cpu",
            tp_size=1,
            transports=(),
        )

    def ignored(self, names: list[str], deadline: Deadline) -> frozenset[str]:
        """The engine judges names itself."""
        return frozenset()

    def begin(
        self, options: UpdateOptions, decision: Decision, manifest: Manifest, deadline: Deadline
    ) -> None:
        """Nothing is told to the engine before all is there."""
        self._manifest, self._label = manifest, options.label

    def announce(self, rows: np.ndarray, values: np.ndarray, deadline: Deadline) -> None:
        """Nothing to do."""

    def commit(self, pack_s: float, deadline: Deadline) -> SyncReport:
        """Call the engine with the tensors."""
        assert self._arena is not None and self._manifest is not None and self._target is not None
        manifest = self._manifest
        buffer = self._arena.buffer
        pairs = [(meta.name, manifest.view(buffer, i)) for i, meta in enumerate(manifest.tensors)]
        target = self._target
        call = getattr(target.engine, "async_update_weights_from_tensor", None)
        if call is None or target.loop is None:
            call = target.engine.update_weights_from_tensor
        result = call(pairs)
        if inspect.isawaitable(result):
            if target.loop is None:
                raise TransportError(
                    "the engine's call is to be awaited: got no event loop, expected one; use HandOver(loop=...)"
                )
            future = asyncio.run_coroutine_threadsafe(_awaited(result), target.loop)
            result = deadline.wait(future, "the engine that was handed the tensors")
        if isinstance(result, SyncReport):
            return result
        return SyncReport(
            version=0,
            label=self._label,
            num_tensors=len(pairs),
            num_bytes=manifest.num_bytes,
            updated=len(pairs),
            transport="handed over",
            pack_s=pack_s,
            message=f"handed {len(pairs)} tensors over; the engine answered {result!r}"[:2000],
        )

    def abort(self, reason: str) -> None:
        """The engine may still read: the next update makes another arena."""
        self.close()

    def close(self) -> None:
        """Give the arena back."""
        if self._arena is not None:
            self._arena.close()
            self._arena = None


async def _awaited(result: Any) -> Any:
    return await result
