"""The replicas of a pool as a trainer's messages reach them, and messages to several of them at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from weight_sync.errors import DeadlineExceeded, EngineDiedError
from weight_sync.publisher.channel import Channel

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
    whole: bool = False
    """It holds the pool's version, all of it."""
    arenas: dict[int, int] = field(default_factory=dict)
    """The pool's arena ids -> its own."""
    ranks: int = 1
    """Its tensor-parallel ranks."""

    @property
    def serving(self) -> bool:
        """It holds the pool's version, and lives as far as one knows."""
        return self.whole and self.channel.dead is None


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


Asked = dict[Member, "Future[Any]"]


def tell_all(messages: Mapping[Member, Any], end: float) -> Asked:
    """Send each member its message, to be answered by `end` (monotonic)."""
    return {
        member: member.channel.submit(message, left(end)) for member, message in messages.items()
    }


def collect(asked: Asked, end: float) -> Answers:
    """What they say until `end`."""
    answers = Answers(replies={}, errors={}, gone={})
    for member, future in asked.items():
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


def ask_all(messages: Mapping[Member, Any], end: float) -> Answers:
    """Send each member its message and wait for what they say."""
    return collect(tell_all(messages, end), end)


def joint_answer(asked: Asked, end: float) -> Future[Any]:
    """Done when all have answered: with one of the replies, or the first refusal."""
    joint: Future[Any] = Future()
    if not asked:
        joint.set_exception(EngineDiedError("every replica that took part has died"))
    missing = len(asked)
    lock = threading.Lock()

    def note(_: Future[Any]) -> None:
        nonlocal missing
        with lock:
            missing -= 1
            if missing:
                return
        answers = collect(asked, end)
        try:
            answers.raise_refusal()
        except Exception as error:
            joint.set_exception(error)
        else:
            joint.set_result(next(iter(answers.replies.values())))

    for future in asked.values():
        future.add_done_callback(note)
    return joint


def same(members: Iterable[Member], message: Any) -> dict[Member, Any]:
    """One message for all of them."""
    return dict.fromkeys(members, message)


def left(end: float) -> float:
    """Seconds until `end`, at least a little."""
    return max(0.001, end - time.monotonic())
