"""The arenas that an engine has open: a bounded number, each gone with its trainer."""

from ..errors import TransportError
from ..transports.arena import OpenedArena
from ..wire.process import why_dead

MAX_ARENAS = 16
"""Arenas that are kept open at once."""


class ArenaTable:
    """Opened arenas by id; used by the receiver's thread alone."""

    def __init__(self) -> None:
        self._arenas: dict[int, OpenedArena] = {}
        self._num_opened = 0

    def __len__(self) -> int:
        return len(self._arenas)

    def add(self, arena: OpenedArena) -> int:
        """Keep an arena and return its id; closes and refuses it when there are too many."""
        if len(self._arenas) >= MAX_ARENAS:
            arena.close()
            raise TransportError(
                f"too many arenas: got {len(self._arenas)} open ones, expected at most {MAX_ARENAS}; "
                "close publishers that are not used any more"
            )
        self._num_opened += 1
        self._arenas[self._num_opened] = arena
        return self._num_opened

    def get(self, arena_id: int) -> OpenedArena:
        """The arena of that id."""
        arena = self._arenas.get(arena_id)
        if arena is None:
            raise TransportError(
                f"no such arena: got id {arena_id}, expected one of {sorted(self._arenas)}; open it first"
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
