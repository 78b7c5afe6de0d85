"""Why the last sessions are over, for messages of theirs that are still on their way."""

import sys
import traceback
from collections import OrderedDict
from typing import Any, NamedTuple

from ..wire.messages import Begin

_KEPT = 32


class _Ending(NamedTuple):
    """Without the error's traceback, which would keep the arena mapped."""

    kind: type[Exception]
    args: tuple[Any, ...]
    arena_id: int


class Endings:
    """By session id; only the last few are remembered."""

    def __init__(self) -> None:
        self._endings: OrderedDict[str, _Ending] = OrderedDict()

    def note(self, request: Begin, reason: Exception) -> None:
        """The session that `request` opened is over because of `reason`."""
        self._endings[request.session_id] = _Ending(type(reason), reason.args, request.arena_id)
        while len(self._endings) > _KEPT:
            self._endings.popitem(last=False)

    def reraise(self, session_id: str) -> None:
        """Raise why that session is over, if it is known."""
        ending = self._endings.get(session_id)
        if ending is not None:
            raise ending.kind(*ending.args)

    def arena_of(self, session_id: str) -> int | None:
        """The arena of a session that is over, if it is known."""
        ending = self._endings.get(session_id)
        return None if ending is None else ending.arena_id


def drop_frames() -> None:
    """Let the error that is being handled, if there is one, hold no memory.

    Its traceback has the frames that it went through, and they what they worked on: the stage, for as long as somebody
    keeps the error, and longer where a frame holds it itself. Its lines can be read all the same.
    """
    error = sys.exc_info()[1]
    seen: list[BaseException] = []
    while error is not None and not any(error is one for one in seen):
        seen.append(error)
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
