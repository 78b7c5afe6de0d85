"""The replicas of a pool as a trainer's messages reach them, and messages to several of them at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from weight_sync.channel import Channel
from weight_sync.errors import DeadlineExceeded, EngineDiedError

from ..errors import EngineClosedError

GONE = (EngineDiedError, EngineClosedError)


@dataclass(slots=True, eq=False, kw_only=True)
class Member:
    """One replica."""

    number: int
    """Its number in the pool."""
    channel: Channel
    """The way to it."""
    ask: Callable[..., Future[Any]]
    """`ask(command, timeout_s=...)`: its other commands."""
    serving: bool = False
    """It holds the pool's version, whole."""
    arenas: dict[int, int] = field(default_factory=dict)
    """The pool's arena ids -> its own."""
    ranks: int = 1
    """Its tensor-parallel ranks."""


@dataclass(slots=True, kw_only=True)
class Answers:
    """What several members said to one question."""

    replies: dict[Member, Any]
    """Of those that answered."""
    errors: dict[Member, Exception]
    """Of those that refused, or did not answer in time."""
    gone: dict[Member, Exception]
    """Of those that are dead."""

    def raise_refusal(self) -> None:
        """Raise the first refusal; with nobody left to refuse, the first death."""
        for error in self.errors.values():
            raise error
        if not self.replies:
            for error in self.gone.values():
                raise error


def ask_all(messages: Mapping[Member, Any], end: float) -> Answers:
    """Send each member its message, then collect what they say until `end` (monotonic)."""
    futures = {
        member: member.channel.submit(message, left(end)) for member, message in messages.items()
    }
    answers = Answers(replies={}, errors={}, gone={})
    for member, future in futures.items():
        try:
            answers.replies[member] = future.result(left(end))
        except GONE as error:
            answers.gone[member] = error
        except TimeoutError as error:
            answers.errors[member] = (
                error
                if isinstance(error, DeadlineExceeded)
                else DeadlineExceeded(f"replica {member.number} did not answer in time")
            )
        except Exception as error:
            answers.errors[member] = error
    return answers


def same(members: Iterable[Member], message: Any) -> dict[Member, Any]:
    """One message for all of them."""
    return dict.fromkeys(members, message)


def left(end: float) -> float:
    """Seconds until `end`, at least a little."""
    return max(0.001, end - time.monotonic())
