"""Drives an engine whose weights come from a plain `torch.distributed` trainer over an update group.

The trainer broadcasts as rank 0 and knows nothing of sessions; whoever calls the engine on its behalf uses this. A
trainer that uses `WeightPublisher(..., transport="process_group")` needs none of it.
"""

from collections.abc import Sequence
from typing import Literal, cast

import torch

from ..errors import SessionError
from ..layout.manifest import dtype_name, parse_dtype
from ..report import SyncReport
from ..wire.deadline import Deadline
from ..wire.messages import (
    ArenaOpened,
    CloseArena,
    EngineInfo,
    GroupHandle,
    Hello,
    JoinGroup,
    LeaveGroup,
    OpenArena,
    Receive,
)
from ..wire.process import current_process
from .channel import Channel
from .endpoint import HasWeightChannel, PackedArena
from .selection import Layout, Selector
from .update import Update, UpdateOptions

Backend = Literal["gloo", "nccl"]
GroupLayout = Literal["tensors", "bucket", "packed_bucket"]


class RemoteStage:
    """Memory of the engine that a group fills; what `Update` needs to know of it."""

    transport = "process_group"

    def __init__(self, layout: Layout, arena_id: int) -> None:
        self.layout = layout
        self.arena_id = arena_id
        self.manifest_known = False


class GroupUpdates:
    """Joins groups and runs updates over them, one session at a time. Not thread safe."""

    def __init__(self, engine: HasWeightChannel, *, timeout_s: float) -> None:
        self._engine = engine
        self._timeout_s = timeout_s
        self._channel: Channel | None = None
        self._stages: dict[str, RemoteStage] = {}
        self._update: Update | None = None

    def join(
        self,
        *,
        group_name: str,
        master_address: str,
        master_port: int,
        rank_offset: int,
        world_size: int,
        backend: Backend,
    ) -> None:
        """Have every rank of the engine join the trainer's group; returns when all members have come."""
        self._close_stage(group_name)
        message = JoinGroup(
            group_name=group_name,
            master_address=master_address,
            master_port=master_port,
            rank_offset=rank_offset,
            world_size=world_size,
            backend=backend,
            timeout_s=self._timeout_s,
        )
        self._open_channel().call(message, self._timeout_s)

    def leave(self, group_name: str) -> None:
        """Have every rank leave the group."""
        self._close_stage(group_name)
        self._open_channel().call(LeaveGroup(group_name=group_name), self._timeout_s)

    @property
    def in_session(self) -> bool:
        """A session over a group is open."""
        return self._update is not None

    def begin(self, group_name: str, options: UpdateOptions) -> None:
        """Open a session that the group fills."""
        if self._update is not None:
            raise SessionError("a session over a group is open; end or abort it first")
        deadline = Deadline(self._timeout_s)
        stage = self._stage(group_name, deadline)
        selector = Selector(
            stage.layout, cast=True, packed=_no_arena, ignored=lambda names: frozenset()
        )
        update = Update(
            channel=self._open_channel(),
            packed=cast(PackedArena, stage),  # an update reads the rest of it only to pack
            options=options,
            selector=selector,
        )
        update.begin(deadline)
        self._update = update

    def receive(
        self,
        names: Sequence[str],
        dtypes: Sequence[str],
        shapes: Sequence[Sequence[int]],
        group_name: str,
        layout: GroupLayout,
    ) -> SyncReport:
        """Receive and stage what the trainer broadcasts now; a failure ends the session."""
        update = self._open_update()
        message = Receive(
            session_id=update.session_id,
            epoch=update.epoch,
            group_name=group_name,
            names=tuple(names),
            dtypes=tuple(dtypes),
            shapes=tuple(tuple(shape) for shape in shapes),
            layout=layout,
            timeout_s=self._timeout_s,
        )
        try:
            update.channel.call(message, self._timeout_s)
        except BaseException as error:
            self._update = None
            update.abort(f"{type(error).__name__}: {error}")
            raise
        self._note(update, message)
        return update.staged_report(len(names))

    def commit(self) -> SyncReport:
        """Commit what was received, or raise and change nothing."""
        update, self._update = self._open_update(), None
        try:
            return update.commit(Deadline(self._timeout_s))
        except BaseException as error:
            update.abort(f"{type(error).__name__}: {error}")
            raise

    def abort(self, reason: str) -> None:
        """Forget the session; fine when there is none."""
        update, self._update = self._update, None
        if update is not None:
            update.abort(reason)

    def close(self) -> None:
        """End an open session and forget the stages; the engine keeps its groups."""
        self.abort("the engine was shut down")
        for name in list(self._stages):
            self._close_stage(name)

    def _open_update(self) -> Update:
        if self._update is None:
            raise SessionError("no session over a group is open; begin one first")
        return self._update

    def _open_channel(self) -> Channel:
        if self._channel is None or self._channel.dead is not None:
            self._channel = self._engine.weight_channel()
            self._stages.clear()
        return self._channel

    def _stage(self, group_name: str, deadline: Deadline) -> RemoteStage:
        channel = self._open_channel()
        if group_name not in self._stages:
            info: EngineInfo = channel.call(Hello(), deadline.left_s("connect"))
            layout = Layout(info, info.manifest.bucket_bytes)
            handle = GroupHandle(
                owner=current_process(),
                group_name=group_name,
                num_bytes=layout.manifest.arena_bytes,
            )
            opened: ArenaOpened = channel.call(
                OpenArena(handle=handle), deadline.left_s("open the stage")
            )
            self._stages[group_name] = RemoteStage(layout, opened.arena_id)
        return self._stages[group_name]

    def _close_stage(self, group_name: str) -> None:
        stage = self._stages.pop(group_name, None)
        if stage is not None and self._channel is not None and self._channel.dead is None:
            self._channel.call(CloseArena(arena_id=stage.arena_id), self._timeout_s)

    @staticmethod
    def _note(update: Update, message: Receive) -> None:
        """Count what was received, for the report."""
        layout = update.packed.layout
        update.num_tensors += len(message.names)
        for name, dtype, shape in zip(message.names, message.dtypes, message.shapes, strict=True):
            got = parse_dtype(dtype)
            num = 1
            for size in shape:
                num *= size
            update.num_bytes += num * got.itemsize
            i = layout.index.get(name)
            if i is not None and layout.dtypes[i] != got:
                update.casts.append((name, dtype_name(got), dtype_name(layout.dtypes[i])))


def _no_arena(row: int) -> torch.Tensor:
    raise AssertionError("tensors of a group are not packed here")
