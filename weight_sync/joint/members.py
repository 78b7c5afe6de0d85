"""Those who answer as one, as messages reach them, and questions to several of them at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..errors import DeadlineExceeded, EngineDiedError, FingerprintMismatch
from ..wire.channel import Channel


@dataclass(slots=True, eq=False, kw_only=True)
class Member:
    """One of them."""

    gone: ClassVar[tuple[type[Exception], ...]] = (EngineDiedError,)
    """Errors that say that it is dead, and not that it refuses."""

    name: str
    """For error messages, such as "rank 1"."""
    channel: Channel
    """The way to it."""
    arenas: dict[int, int] = field(default_factory=dict)
    """The ids that a trainer knows -> its own."""
    ranks: int = 1
    """Ranks that it brings into an update group."""


@dataclass(slots=True, kw_only=True)
class Answers:
    """What several members said to one question."""

    replies: dict[Any, Any]
    """By member, of those that answered."""
    errors: dict[Any, Exception]
    """Of those that refused, or did not answer in time."""
    gone: dict[Any, Exception]
    """Of those that are dead."""

    def raise_refusal(self) -> None:
        """Raise the first refusal; with nobody left to refuse, the first death."""
        self._raise_first(self.errors)
        if not self.replies:
            self._raise_first(self.gone)

    @staticmethod
    def _raise_first(errors: dict[Any, Exception]) -> None:
        for member, error in errors.items():
            note = f"said by {member.name}"
            if note not in getattr(error, "__notes__", ()):
                error.add_note(note)
            raise error

    def compare_received(self) -> None:
        """Raise unless what a plain trainer broadcast is the same everywhere: nobody has said what it should be."""
        if len({getattr(reply, "received", 0) for reply in self.replies.values()}) > 1:
            raise FingerprintMismatch(
                "different bytes were received over the group; make a new group and send again"
            )

    def raise_loss(self) -> None:
        """As `raise_refusal`, and a death is one too."""
        self._raise_first({**self.errors, **self.gone})


Asked = dict[Any, "Future[Any]"]
"""Answers that are still to come, by member."""


def tell_all(messages: Mapping[Any, Any], timeout_s: float) -> Asked:
    """Send each member its message; the first one is told last: what it does may need the others."""
    told = {
        member: member.channel.submit(message, timeout_s)
        for member, message in reversed(list(messages.items()))
    }
    return dict(reversed(list(told.items())))


Wait = Callable[["Future[Any]", float], Any]
"""The result of a future, within so many seconds."""


def collect(asked: Asked, end: float, wait: Wait = Future.result) -> Answers:
    """What they say until `end` (monotonic)."""
    answers = Answers(replies={}, errors={}, gone={})
    for member, future in asked.items():
        try:
            answers.replies[member] = wait(future, left(end))
        except TimeoutError as error:
            late = DeadlineExceeded(f"{member.name} did not answer in time")
            answers.errors[member] = error if isinstance(error, DeadlineExceeded) else late
        except Exception as error:
            told = answers.gone if isinstance(error, member.gone) else answers.errors
            told[member] = error
    return answers


def joint_answer(asked: Asked, end: float, *, spare: bool) -> Future[Any]:
    """Done when all have answered: with one of the replies, or the first refusal; unless `spare`, a death is one."""
    joint: Future[Any] = Future()
    if not asked:
        joint.set_exception(EngineDiedError("all that took part in it have died"))
    missing, lock = len(asked), threading.Lock()

    def note(_: Future[Any]) -> None:
        nonlocal missing
        with lock:
            missing -= 1
            if missing:
                return
        answers = collect(asked, end)
        try:
            answers.raise_refusal()
            if not spare:
                answers.raise_loss()
            answers.compare_received()
        except Exception as error:
            joint.set_exception(error)
        else:
            joint.set_result(next(iter(answers.replies.values())))

    for future in asked.values():
        future.add_done_callback(note)
    return joint


def same(members: Iterable[Any], message: Any) -> dict[Any, Any]:
    """One message for all of them."""
    return dict.fromkeys(members, message)


def left(end: float) -> float:
    """Seconds until `end`, at least a little."""
    return max(0.001, end - time.monotonic())
