"""A trainer's arenas and groups, each known to the trainer by one id and to every member by its own."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Collection
from concurrent.futures import Future
from functools import partial
from typing import Any

import msgspec

from ..errors import ArenaGoneError, DeadlineExceeded, SyncError, TransportError
from ..time_left import left_s
from ..wire.futures import wait
from ..wire.messages import (
    Ack,
    ArenaHandle,
    ArenaOpened,
    CloseArena,
    GroupHandle,
    JoinGroup,
    LeaveGroup,
    LocalHandle,
    OpenArena,
)
from ..wire.process import why_dead
from .members import Answers, Terms, ask_all, collect, same, tell_all
from .session import PATIENCE_S

logger = logging.getLogger(__name__)


class JointArenas:
    """Opens and closes them on all members. Used by the thread of a `JointService` alone."""

    def __init__(self, terms: Terms) -> None:
        self._terms = terms
        self._opened: dict[int, OpenArena] = {}

    def handle(self, arena_id: int) -> ArenaHandle:
        """Where the bytes of an arena are."""
        if arena_id not in self._opened:
            raise ArenaGoneError(
                f"no such arena: got {arena_id}, expected one of the {len(self._opened)} that are open; open it again"
            )
        return self._opened[arena_id].handle

    def open(self, message: OpenArena, members: Collection[Any], end: float) -> ArenaOpened:
        """Open it on every member, or on none."""
        self._forget_orphans(members)
        arena_id = secrets.randbits(62)  # never one that another service at this address has given
        asked = tell_all(same(members, message), self._terms.patience_s or left_s(end))
        answers = collect(asked, end, self._terms.wait)
        for member, reply in answers.replies.items():
            member.arenas[arena_id] = reply.arena_id
        self._opened[arena_id] = message
        try:
            answers.check(spare=self._terms.spare)
            if time.monotonic() >= end:
                raise DeadlineExceeded(
                    "the arena was opened too late for its caller, and closed again; raise timeout_s"
                )
        except Exception:
            self.close(CloseArena(arena_id=arena_id), members, end)
            for member in answers.errors:
                asked[member].add_done_callback(partial(_close_late, member))
            raise
        return ArenaOpened(arena_id=arena_id)

    def close(self, message: CloseArena, members: Collection[Any], end: float) -> Ack:
        """Close it everywhere; unknown ones are fine."""
        self._opened.pop(message.arena_id, None)
        own = {member: member.arenas.pop(message.arena_id, None) for member in members}
        closing = {m: CloseArena(arena_id=i) for m, i in own.items() if i is not None}
        collect(tell_all(closing, PATIENCE_S), end, self._terms.wait)
        return Ack()

    def opened_by(self, arena_id: int, members: Collection[Any], end: float) -> list[Any]:
        """Those of `members` that can read the arena; who came after it was opened opens it now.

        A newcomer that cannot (it is not in the trainer's group) takes no part in the update and catches up later.
        """
        self.handle(arena_id)  # or an error
        able = []
        for member in members:
            if arena_id not in member.arenas:
                timeout_s = left_s(end)
                asked = member.channel.submit(self._opened[arena_id], timeout_s)
                try:
                    opened = wait(asked, timeout_s, "OpenArena")
                except SyncError as error:
                    asked.add_done_callback(partial(_close_late, member))
                    logger.warning("%s takes no part in an update: %s", member.name, error)
                    continue
                member.arenas[arena_id] = opened.arena_id
            able.append(member)
        if not able:
            raise TransportError("nobody can read the arena any more; connect again")
        return able

    def join(self, message: JoinGroup, members: Collection[Any], end: float) -> Ack:
        """Have all ranks of all members join a group, one member's ranks after the other's."""
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
        return self._joined(ask_all(self._terms, messages, end))

    def leave(self, message: LeaveGroup, members: Collection[Any], end: float) -> Ack:
        """Have all leave it, and forget its stages."""
        for arena_id, opened in list(self._opened.items()):
            handle = opened.handle
            if isinstance(handle, GroupHandle) and handle.group_name == message.group_name:
                self.close(CloseArena(arena_id=arena_id), members, end)
        return self._joined(ask_all(self._terms, same(members, message), end))

    def _forget_orphans(self, members: Collection[Any]) -> None:
        """The members close the arenas of a dead trainer by themselves, and nobody says so here."""
        for arena_id, opened in list(self._opened.items()):
            if isinstance(opened.handle, LocalHandle) or why_dead(opened.handle.owner) is None:
                continue
            del self._opened[arena_id]
            for member in members:
                member.arenas.pop(arena_id, None)

    @staticmethod
    def _joined(answers: Answers) -> Ack:
        answers.raise_loss()  # A group without one of its members is none.
        return Ack()


def _close_late(member: Any, opened: Future[Any]) -> None:
    """Nobody waits any more for what a member makes of an arena."""
    if opened.exception() is None:
        member.channel.submit(CloseArena(arena_id=opened.result().arena_id), PATIENCE_S)
