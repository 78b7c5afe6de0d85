"""Those who answer as one, as messages reach them, and questions to several of them at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from ..errors import DeadlineExceeded, EngineDiedError, FingerprintMismatch
from ..time_left import left_s
from ..wire.channel import Channel
from ..wire.futures import resolve, when_all_are_done


class Terms(Protocol):
    """On which terms members take part; a `JointService`."""

    patience_s: float
    """How long a member may take to come to a message, whatever the trainer's deadline; 0: until that."""
    spare: bool
    """A member that dies is left out; False: then the update fails."""
    commit_patience_s: float
    """How late a member that has voted may come to the commit, whatever the trainer's deadline; 0: until that."""

    def wait(self, future: Future[Any], timeout_s: float) -> Any:
        """The result of a future, within so many seconds."""


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

    def check(self, *, spare: bool) -> None:
        """`raise_refusal` where members may die (see `Terms`), else `raise_loss`."""
        if spare:
            self.raise_refusal()
        else:
            self.raise_loss()


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
            answers.replies[member] = wait(future, left_s(end))
        except TimeoutError as error:
            late = DeadlineExceeded(f"{member.name} did not answer in time")
            answers.errors[member] = error if isinstance(error, DeadlineExceeded) else late
        except Exception as error:
            told = answers.gone if isinstance(error, member.gone) else answers.errors
            told[member] = error
    return answers


def ask_all(terms: Terms, messages: Mapping[Any, Any], end: float) -> Answers:
    """Send each member its message, and hear what they say until `end`."""
    return collect(tell_all(messages, terms.patience_s or left_s(end)), end, terms.wait)


def joint_answer(asked: Asked, end: float, *, spare: bool) -> Future[Any]:
    """Done when all have answered: with one of the replies, or the first refusal; unless `spare`, a death is one."""
    joint: Future[Any] = Future()
    if not asked:
        joint.set_exception(EngineDiedError("all that took part in it have died"))
        return joint

    def conclude() -> Any:
        answers = collect(asked, end)
        answers.check(spare=spare)
        answers.compare_received()
        return next(iter(answers.replies.values()))

    when_all_are_done(asked.values(), lambda: resolve(joint, conclude))
    return joint


def same(members: Iterable[Any], message: Any) -> dict[Any, Any]:
    """One message for all of them."""
    return dict.fromkeys(members, message)
