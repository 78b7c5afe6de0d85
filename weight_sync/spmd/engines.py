"""The engines that one trainer's ranks publish to together, driven by rank 0: one arena, one session each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from ..errors import ManifestMismatch, TransportError
from ..layout.manifest import Manifest
from ..publisher.channel import Channel, wait
from ..publisher.endpoint import (
    EngineEndpoint,
    GroupBackend,
    HasWeightChannel,
    PackedArena,
    TransportChoice,
    current_gpu,
)
from ..publisher.selection import Layout
from ..publisher.update import PackedRows, Update, UpdateOptions
from ..report import SyncReport
from ..transports.arena import SharedBytes
from ..transports.shared_memory import SharedMemoryArena
from ..transports.spans import spans_of
from ..wire.deadline import Deadline
from ..wire.messages import EngineInfo, SharedMemoryHandle, Vote
from .plan import Decision

Target = str | HasWeightChannel


class _Borrowed(SharedBytes):
    """The ranks' arena as one engine's: closing it leaves the memory to the others."""

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
    """All engines of one trainer. Used by one thread of rank 0."""

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
        self._endpoints: dict[object, _Endpoint] = {}
        self._updates: list[Update] = []

    @property
    def handle(self) -> SharedMemoryHandle | None:
        """The arena that the ranks write; None before `connect`, and after it was given up."""
        return None if self._arena is None else self._arena.handle

    def connect(self, targets: Sequence[Target], deadline: Deadline) -> None:
        """Have every engine open the arena."""
        keys = [target if isinstance(target, str) else id(target) for target in targets]
        for key in set(self._endpoints) - set(keys):
            self._endpoints.pop(key).close()
        for key, target in zip(keys, targets, strict=True):
            if key not in self._endpoints:
                self._endpoints[key] = _Endpoint(
                    target,
                    bucket_bytes=self.bucket_bytes,
                    transport=self._transport,
                    group_host=self._group_host,
                    group_backend=self._group_backend,
                    gpu=self._gpu,
                )
                self._endpoints[key].lend = self._lend
        for endpoint in self._endpoints.values():
            endpoint.arena(deadline)

    def info(self, described: object, deadline: Deadline) -> EngineInfo:
        """What the first engine says of itself, asked now; the trainer's tensors do not change it."""
        return next(iter(self._endpoints.values())).hello(deadline)

    def _lend(self, layout: Layout) -> SharedMemoryArena:
        """The arena, in this layout; a new one when the only engine has changed its own."""
        digest = layout.manifest.digest
        if self._arena is not None and digest != self._digest:
            if len(self._endpoints) > 1:
                raise ManifestMismatch(
                    f"engines differ: got {len(layout.shapes)} tensors in another layout than the other engine's, "
                    "expected one model behind all of them; publish to each kind from a mesh of its own"
                )
            self._arena.close()
            self._arena = None
        if self._arena is None:
            self._arena = SharedMemoryArena(layout.manifest.arena_bytes)
            self._digest = digest
        return self._arena

    def ignored(self, names: list[str], deadline: Deadline) -> frozenset[str]:
        """Of unknown names, those that the engine has no use for."""
        endpoint = next(iter(self._endpoints.values()))
        return endpoint._ask_ignored(names, deadline)

    def begin(
        self, options: UpdateOptions, decision: Decision, manifest: Manifest, deadline: Deadline
    ) -> None:
        """Open a session at every engine, for one version: the first that is above what each of them serves."""
        self._begin(options, decision, deadline)
        version = max(update.version for update in self._updates)
        if any(update.version != version for update in self._updates):
            self._end_all("the engines serve different versions")
            self._begin(dataclasses.replace(options, version=version), decision, deadline)

    def _begin(self, options: UpdateOptions, decision: Decision, deadline: Deadline) -> None:
        self._updates = []
        for endpoint in self._endpoints.values():
            packed = endpoint.arena(deadline)
            update = Update(
                channel=endpoint.channel(),
                packed=packed,
                options=options,
                selector=endpoint.selector(packed, deadline, cast=options.cast),
                num_tensors=decision.num_tensors,
                num_bytes=int(packed.num_bytes[decision.rows].sum()),
                casts=decision.casts,
            )
            self._updates.append(update)  # before: it may open the session and not answer in time
            update.begin(deadline)

    def announce(self, rows: np.ndarray, values: np.ndarray, deadline: Deadline) -> None:
        """Tell the engines that rows are complete in the arena."""
        assert self._arena is not None
        for update in self._updates:
            if update.packed.transport == "process_group":  # it travels from the group's own memory
                manifest = update.packed.layout.manifest
                for start, stop in spans_of(manifest, rows):
                    update.packed.buffer[start:stop].copy_(self._arena.buffer[start:stop])
            update.announce(PackedRows(indices=rows, fingerprints=values), deadline)

    def commit(self, pack_s: float, deadline: Deadline) -> list[SyncReport]:
        """Commit at every engine, side by side, once each has voted for it; in the order in which they were given."""
        for update in self._updates:
            update.pack_s = pack_s
            update.settle(deadline)
        if len(self._updates) == 1:
            reports = [self._updates[0].commit(deadline)]
        else:
            self._vote(deadline)
            with ThreadPoolExecutor(len(self._updates)) as pool:
                futures = [pool.submit(update.commit, deadline) for update in self._updates]
            failed = [error for future in futures if (error := future.exception()) is not None]
            if failed:
                if len(failed) < len(futures):
                    failed[0].add_note(
                        f"{len(futures) - len(failed)} of the engines have committed"
                    )
                raise failed[0]
            reports = [future.result() for future in futures]
        self._updates = []
        return reports

    def abort(self, reason: str) -> None:
        """End what is open; where that is not certain, the arena is never written again."""
        if not self._end_all(reason):
            self.forget()

    def _end_all(self, reason: str) -> bool:
        """End every session; all are told, whatever one of them answers. False: not certain everywhere."""
        updates, self._updates = self._updates, []
        ended = [update.abort(reason) for update in updates]
        return all(ended)

    def _vote(self, deadline: Deadline) -> None:
        """Raise unless every engine can commit: what one of them refuses, none of them serves."""
        votes = []
        for update in self._updates:
            vote = Vote(session_id=update.session_id, epoch=update.epoch)
            votes.append((vote, update.channel.submit(vote, deadline.left_s("vote"))))
        for vote, future in votes:
            wait(future, vote, deadline.left_s("vote"))

    def forget(self) -> None:
        """Leave the arena to whoever still reads it; the next update makes a new one."""
        for endpoint in self._endpoints.values():
            endpoint.drop_arena()
        if self._arena is not None:
            self._arena.close()
        self._arena = None

    def close(self) -> None:
        """Give arena and connections back."""
        self.abort("the publisher was closed")
        for endpoint in self._endpoints.values():
            endpoint.close()
        self._endpoints.clear()
        self.forget()
