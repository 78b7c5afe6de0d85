"""What a tick holds; see `ticks`. Sent from rank 0 to the other ranks of the same engine only."""

import msgspec

from .commands import Command


class TickMessage(msgspec.Struct, frozen=True, kw_only=True, tag=True, forbid_unknown_fields=True):
    """Base of everything that a tick may hold."""


class Ordered(TickMessage, frozen=True, kw_only=True):
    """A client's command."""

    body: Command
    """The command; rank 0 alone knows who asked."""


class Boundary(TickMessage, frozen=True, kw_only=True):
    """Run what every rank has armed under this name, such as the write of a weight update."""

    name: str


class Disarm(TickMessage, frozen=True, kw_only=True):
    """Rank 0 waited too long for this boundary and has given it up: no rank runs what it armed."""

    name: str


class Expire(TickMessage, frozen=True, kw_only=True):
    """These calls of `generate` end with what they have: their deadlines have passed, or nothing goes on."""

    numbers: list[int]
    """`GenerateGroup.number`: how many came before it."""
    why: str
    """The reason in words."""


class EndPause(TickMessage, frozen=True, kw_only=True):
    """The lease of the pause has ended."""


Item = Ordered | Boundary | Disarm | Expire | EndPause


class Tick(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What every rank does before its next step, in this order."""

    items: list[Item]
