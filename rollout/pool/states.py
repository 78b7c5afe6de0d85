"""Where each replica of a pool stands, and what is to be done about it: one function of what is true of all of them.

    start --> COMING --holds the version--> SERVING <--holds it again-- COMING, BEHIND
              SERVING --does not hold it, or an answer denies it--> COMING --cannot be given it--> BEHIND
              BEHIND --another version; nobody serves, and a while has passed--> COMING
              SERVING, COMING, BEHIND --is to leave--> RETIRING --has finished, or its time is up--> GONE
              COMING, BEHIND --cannot be given it while another serves--> GONE, and another one starts in its place
              any --dies, hangs--> GONE, and unless it was leaving another one starts in its place

Nothing here remembers: a state follows from what the replica has said and from what was asked of it, whatever it was a
moment ago. Who cannot be given the version is tried again while nobody serves, instead of being replaced: another one
would get it from where it did, and meanwhile this one is there for the next complete update. Who is to leave and alone
holds the version stays, within its time, until another does.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass


class State(enum.Enum):
    """Where a replica stands."""

    COMING = "coming"
    """It is told what the pool was asked for, and is brought to the served version."""
    SERVING = "serving"
    """It holds the served version, and gets requests."""
    BEHIND = "behind"
    """It does not hold the served version."""
    RETIRING = "retiring"
    """It gets nothing new, and ends when it has finished what it has."""
    GONE = "gone"
    """It is no part of the pool any more."""


class Todo(enum.Enum):
    """What is to be done about a replica, besides giving it requests or not."""

    NOTHING = enum.auto()
    """It is as it should be, or somebody is at it."""
    ASK = enum.auto()
    """Ask it what it holds, and bring it to the served version."""
    REPLACE = enum.auto()
    """End it now, and start another one in its place."""
    END = enum.auto()
    """End it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What is true of a replica now."""

    dead: bool = False
    """Its processes have ended, or do not answer."""
    leaving: bool = False
    """The pool was asked to do without it."""
    finished: bool = False
    """It is busy with nothing."""
    late: bool = False
    """It is leaving, and its time is up."""
    holds: bool = False
    """It has said that it holds the served version, whole."""
    denied: bool = False
    """An answer since then says that its weights are no version."""
    asked: bool = False
    """It is being told what the pool was asked for, or being asked what it holds and brought to the served version."""
    tried: bool = False
    """It could not be brought to this version, a short while ago."""

    @property
    def serves(self) -> bool:
        """Requests may go there."""
        return self.holds and not (self.denied or self.dead or self.leaving)


def decide(replicas: Mapping[int, Facts], *, memory_is_gone: bool) -> dict[int, tuple[State, Todo]]:
    """Where each of them stands. memory_is_gone: there is no room for weights, or nobody has any to give."""
    serving = {number for number, facts in replicas.items() if facts.serves}
    return {
        number: _decide(facts, bool(serving - {number}), memory_is_gone)
        for number, facts in replicas.items()
    }


def _decide(facts: Facts, others_serve: bool, memory_is_gone: bool) -> tuple[State, Todo]:
    if facts.leaving:
        is_needed = facts.holds and not (facts.denied or others_serve)
        over = facts.dead or facts.late or (facts.finished and not is_needed)
        return (State.GONE, Todo.END) if over else (State.RETIRING, Todo.NOTHING)
    if facts.dead:
        return State.GONE, Todo.REPLACE
    if facts.serves:
        return State.SERVING, Todo.NOTHING
    if facts.asked:
        return State.COMING, Todo.NOTHING
    if facts.denied:
        return State.COMING, Todo.ASK
    if memory_is_gone:
        return State.BEHIND, Todo.NOTHING
    if not facts.tried:
        return State.COMING, Todo.ASK
    return (State.GONE, Todo.REPLACE) if others_serve else (State.BEHIND, Todo.NOTHING)
