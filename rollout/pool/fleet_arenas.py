"""A trainer's arenas and groups, each known to the pool by one id and to every replica by its own."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Collection

import msgspec

from weight_sync.errors import ArenaGoneError, SyncError, TransportError
from weight_sync.wire.messages import (
    Ack,
    ArenaHandle,
    ArenaOpened,
    CloseArena,
    GroupHandle,
    JoinGroup,
    LeaveGroup,
    OpenArena,
)

from .members import Answers, Member, ask_all, left, same

logger = logging.getLogger(__name__)


class FleetArenas:
    """Opens and closes them on all replicas. Used by the thread of `FleetWeights` alone."""

    def __init__(self) -> None:
        self._handles: dict[int, ArenaHandle] = {}

    def handle(self, arena_id: int) -> ArenaHandle:
        """Where the bytes of an arena are."""
        if arena_id not in self._handles:
            raise ArenaGoneError(
                f"no such arena: got {arena_id}, expected one of the {len(self._handles)} that are open; open it again"
            )
        return self._handles[arena_id]

    def open(self, message: OpenArena, members: Collection[Member], end: float) -> ArenaOpened:
        """Open it on every replica, or on none."""
        arena_id = secrets.randbits(62)  # never one that another pool at this address has given
        answers = ask_all(same(members, message), end)
        for member, reply in answers.replies.items():
            member.arenas[arena_id] = reply.arena_id
        self._handles[arena_id] = message.handle
        if answers.errors or not answers.replies:
            self.close(CloseArena(arena_id=arena_id), members, end)
            answers.raise_refusal()
        return ArenaOpened(arena_id=arena_id)

    def close(self, message: CloseArena, members: Collection[Member], end: float) -> Ack:
        """Close it everywhere; unknown ones are fine."""
        self._handles.pop(message.arena_id, None)
        own = {member: member.arenas.pop(message.arena_id, None) for member in members}
        closing = {m: CloseArena(arena_id=i) for m, i in own.items() if i is not None}
        ask_all(closing, end)
        return Ack()

    def opened_by(self, arena_id: int, members: Collection[Member], end: float) -> list[Member]:
        """Those of `members` that can read the arena; who came after it was opened opens it now.

        A newcomer that cannot (it is not in the trainer's group) takes no part in the update and catches up later.
        """
        handle = self.handle(arena_id)
        able = []
        for member in members:
            if arena_id not in member.arenas:
                try:
                    opened = member.channel.call(OpenArena(handle=handle), left(end))
                except SyncError as error:
                    logger.warning(
                        "replica %d takes no part in an update: %s", member.number, error
                    )
                    continue
                member.arenas[arena_id] = opened.arena_id
            able.append(member)
        if not able:
            raise TransportError("no replica can read the arena any more; connect again")
        return able

    @staticmethod
    def join(message: JoinGroup, members: Collection[Member], end: float) -> Ack:
        """Have all ranks of all replicas join a group, one replica's ranks after the other's."""
        offset = message.rank_offset
        messages = {}
        for member in members:
            messages[member] = msgspec.structs.replace(message, rank_offset=offset)
            offset += member.ranks
        if offset > message.world_size:
            raise TransportError(
                f"group {message.group_name!r}: got a world of {message.world_size}, expected at least {offset}: the "
                f"ranks of all {len(messages)} replicas, after rank {message.rank_offset - 1}"
            )
        return _all_or_error(ask_all(messages, end))

    def leave(self, message: LeaveGroup, members: Collection[Member], end: float) -> Ack:
        """Have all leave it, and forget its stages."""
        for arena_id, handle in list(self._handles.items()):
            if isinstance(handle, GroupHandle) and handle.group_name == message.group_name:
                self.close(CloseArena(arena_id=arena_id), members, end)
        return _all_or_error(ask_all(same(members, message), end))


def _all_or_error(answers: Answers) -> Ack:
    if answers.errors or not answers.replies:
        answers.raise_refusal()
    for error in answers.gone.values():  # A group without one of its members is none.
        raise error
    return Ack()
