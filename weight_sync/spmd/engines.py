"""The engines that one trainer's ranks publish to together, driven by rank 0: one arena, one session."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from ..errors import TransportError
from ..joint.engines import JointTarget, Target
from ..layout.manifest import Manifest
from ..publisher.endpoint import (
    EngineEndpoint,
    GroupBackend,
    PackedArena,
    TransportChoice,
    current_gpu,
)
from ..publisher.open_session import UpdateOptions
from ..publisher.selection import Layout
from ..publisher.update import PackedRows, Update
from ..report import SyncReport
from ..transports.arena import SharedBytes
from ..transports.chunks import ranges_of
from ..transports.shared_memory import SharedMemoryArena
from ..wire.channel import Channel
from ..wire.deadline import Deadline
from ..wire.messages import EngineInfo, SharedMemoryHandle
from .plan import Decision


class _Borrowed(SharedBytes):
    """The ranks' arena as an engine's: closing it leaves the memory to the others."""

    def __init__(self, arena: SharedMemoryArena) -> None:
        self.buffer = arena.buffer
        self.handle = arena.handle

    def close(self) -> None:
        self.buffer = torch.empty(0, dtype=torch.uint8)


class _Endpoint(EngineEndpoint):
    """An endpoint whose arena is not its own; `lend` gives the one for a layout."""

    lend: Callable[[Layout], SharedMemoryArena]

    def _make(self, channel: Channel, layout: Layout, deadline: Deadline) -> PackedArena:
        arena = _Borrowed(self.lend(layout))
        return self._open(channel, arena, layout, "shared_memory", deadline)

    def _make_group(
        self, channel: Channel, info: EngineInfo, layout: Layout, deadline: Deadline
    ) -> PackedArena:
        self.lend(layout)
        return super()._make_group(channel, info, layout, deadline)


class Engines:
    """The engine of one trainer, or several that answer as one. Used by one thread of rank 0."""

    def __init__(
        self,
        *,
        bucket_bytes: int,
        transport: TransportChoice,
        group_host: str = "127.0.0.1",
        group_backend: GroupBackend = "auto",
    ) -> None:
        if transport not in ("shared_memory", "process_group"):
            raise TransportError(
                f"transport: got {transport!r}, expected 'shared_memory' or 'process_group'; ranks that write "
                "together need memory that all of them can reach"
            )
        self.bucket_bytes = bucket_bytes
        self._digest = ""
        self._arena: SharedMemoryArena | None = None
        self._transport: TransportChoice = transport
        self._group_host = group_host
        self._group_backend = group_backend
        self._gpu = current_gpu()
        self._keys: list[str | int] = []
        self._endpoint: _Endpoint | None = None
        self._update: Update | None = None

    @property
    def handle(self) -> SharedMemoryHandle | None:
        """The arena that the ranks write; None before `connect`, and after it was given up."""
        return None if self._arena is None else self._arena.handle

    @property
    def _connected(self) -> _Endpoint:
        assert self._endpoint is not None, "connect() comes first"
        return self._endpoint

    def connect(self, targets: Sequence[Target], deadline: Deadline) -> None:
        """Have every engine open the arena."""
        keys = [target if isinstance(target, str) else id(target) for target in targets]
        if self._endpoint is None or keys != self._keys:
            self._disconnect()
            self._endpoint = _Endpoint(
                JointTarget(targets) if len(targets) > 1 else targets[0],
                bucket_bytes=self.bucket_bytes,
                transport=self._transport,
                group_host=self._group_host,
                group_backend=self._group_backend,
                gpu=self._gpu,
            )
            self._endpoint.lend = self._lend
            self._keys = keys
        self._endpoint.arena(deadline)

    def _disconnect(self) -> None:
        if self._endpoint is not None:
            self._endpoint.close()
            self._endpoint = None

    def info(self, described: object, deadline: Deadline) -> EngineInfo:
        """What the engine says of itself, asked now; the trainer's tensors do not change it."""
        return self._connected.hello(deadline)

    def _lend(self, layout: Layout) -> SharedMemoryArena:
        """The arena, in this layout; a new one when the engine has changed its own."""
        digest = layout.manifest.digest
        if self._arena is not None and digest != self._digest:
            self._arena.close()
            self._arena = None
        if self._arena is None:
            self._arena = SharedMemoryArena(layout.manifest.arena_bytes)
            self._digest = digest
        return self._arena

    def ignored(self, names: list[str], deadline: Deadline) -> frozenset[str]:
        """Of unknown names, those that the engine has no use for."""
        return self._connected._ask_ignored(names, deadline)

    def begin(
        self, options: UpdateOptions, decision: Decision, manifest: Manifest, deadline: Deadline
    ) -> None:
        """Open a session. `EngineRestartedError` for parts where other engines have taken the place of these."""
        endpoint = self._connected
        packed = endpoint.arena(deadline)
        endpoint.check_same(strict=options.strict)
        # Known before it begins: it may open the session and not answer in time.
        self._update = Update(
            channel=endpoint.channel(),
            packed=packed,
            options=options,
            selector=endpoint.selector(packed, deadline, cast=options.cast),
            num_tensors=decision.num_tensors,
            num_bytes=int(packed.num_bytes[decision.rows].sum()),
            casts=decision.casts,
        )
        self._update.begin(deadline)

    def announce(self, rows: np.ndarray, values: np.ndarray, deadline: Deadline) -> None:
        """Tell the engine that rows are complete in the arena."""
        update = self._update
        assert self._arena is not None and update is not None
        if update.packed.transport == "process_group":  # it travels from the group's own memory
            manifest = update.packed.layout.manifest
            for start, stop in ranges_of(manifest, rows):
                update.packed.buffer[start:stop].copy_(self._arena.buffer[start:stop])
        update.announce(PackedRows(indices=rows, fingerprints=values), deadline)

    def commit(self, pack_s: float, deadline: Deadline) -> SyncReport:
        """Commit, at every engine once each has voted for it, or at none."""
        update = self._update
        assert update is not None
        update.pack_s = pack_s
        report = update.commit(deadline)
        self._update = None
        self._connected.note_commit(report.version)
        return report

    def abort(self, reason: str) -> None:
        """End what is open; where that is not certain, the arena is never written again."""
        update, self._update = self._update, None
        if update is not None and not update.abort(reason):
            self.forget()

    def forget(self) -> None:
        """Leave the arena to whoever still reads it; the next update makes a new one."""
        if self._endpoint is not None:
            self._endpoint.drop_arena()
        if self._arena is not None:
            self._arena.close()
        self._arena = None

    def close(self) -> None:
        """Give arena and connections back."""
        self.abort("the publisher was closed")
        self._disconnect()
        self.forget()
