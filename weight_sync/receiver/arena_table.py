"""The arenas that an engine has open: a bounded number, each gone with its trainer."""

import secrets
from collections import Counter

from ..errors import ArenaGoneError, TransportError
from ..staging.opened_arena import OpenedArena
from ..wire.process import why_dead

MAX_ARENAS = 16
"""Arenas that are kept open at once."""


class ArenaTable:
    """Opened arenas by id; used by the receiver's thread alone."""

    def __init__(self) -> None:
        self._arenas: dict[int, OpenedArena] = {}

    def __len__(self) -> int:
        return len(self._arenas)

    def add(self, arena: OpenedArena) -> int:
        """Keep an arena and return its id; closes and refuses it when there are too many."""
        if len(self._arenas) >= MAX_ARENAS:
            arena.close()
            owners = Counter(opened.owner.pid for opened in self._arenas.values())
            held = ", ".join(f"{num} of process {pid}" for pid, num in owners.most_common())
            raise TransportError(
                f"too many arenas: got {len(self._arenas)} open ones ({held}), expected at most {MAX_ARENAS}; "
                "close publishers that are not used any more"
            )
        # Random, so that it is never taken for an id of another engine, such as the last one at this address.
        arena_id = secrets.randbits(62)
        self._arenas[arena_id] = arena
        return arena_id

    def get(self, arena_id: int) -> OpenedArena:
        """The arena of that id."""
        arena = self._arenas.get(arena_id)
        if arena is None:
            raise ArenaGoneError(
                f"no such arena: got id {arena_id}, expected one of the {len(self._arenas)} that are open; open it "
                "again"
            )
        return arena

    def refuse(self, arena_id: int) -> None:
        """A bucket of this arena is not taken; fine when there is none of that id."""
        arena = self._arenas.get(arena_id)
        if arena is not None:
            arena.refuse()

    def close(self, arena_id: int) -> None:
        """Drop an arena; fine when there is none of that id."""
        arena = self._arenas.pop(arena_id, None)
        if arena is not None:
            arena.close()

    def ids(self) -> list[int]:
        """All of them."""
        return list(self._arenas)

    def orphans(self) -> list[int]:
        """Those whose trainer is dead or has closed its end."""
        return [
            i
            for i, arena in self._arenas.items()
            if why_dead(arena.owner) is not None or arena.given_up()
        ]
