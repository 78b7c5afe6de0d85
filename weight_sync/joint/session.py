"""One update session with several members: begun by all or none, voted by all, and only then committed."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Self

import msgspec

from ..errors import (
    DeadlineExceeded,
    EngineDiedError,
    SessionError,
    StaleVersionError,
    WeightUpdateError,
)
from ..time_left import left_s
from ..wire.messages import (
    Abort,
    Begin,
    Bucket,
    BucketReply,
    Commit,
    CommitReply,
    Receive,
    Vote,
    WireManifest,
)
from .members import Answers, Asked, Terms, ask_all, collect, joint_answer, tell_all

PATIENCE_S = 600.0
"""How long a member may take before it comes to what it must not miss, such as the end of a session."""
TIMINGS = (
    *("stage_s", "copy_s", "verify_s", "pause_s"),
    *("begin_to_committed_s", "begin_to_verified_s"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitOutcome:
    """What became of a commit."""

    committed: Mapping[Any, CommitReply]
    """By member: who serves the new version."""
    failed: Mapping[Any, Exception]
    """Who voted for it and then could not, or did not say so in time."""
    late: Asked = field(default_factory=dict)
    """Of those who did not say so in time, who are to come to it; their answers."""

    @property
    def reply(self) -> CommitReply:
        """The answer to the trainer: durations are those of the slowest. Raises where nobody has committed."""
        for error in self.failed.values() if not self.committed else ():
            raise error
        replies = list(self.committed.values())
        if not replies:
            raise EngineDiedError("all died during the commit; start new ones")
        slowest = {name: max(getattr(reply, name) for reply in replies) for name in TIMINGS}
        return msgspec.structs.replace(replies[0], **slowest)


@dataclass(slots=True, kw_only=True)
class JointSession:
    """An open session. Used by the thread of its `JointService` alone."""

    terms: Terms
    """Of those who take part."""
    inner_id: str
    """What the members call it."""
    request: Begin
    """As the trainer sent it."""
    epoch: int
    """The trainer's number of it."""
    version: int
    """Version to be."""
    manifest: WireManifest | None
    """The arena's layout; None: the members' own."""
    epochs: dict[Any, int]
    """Who takes part, and each one's own epoch; 0: not known, its answer came too late."""
    _buckets: list[Asked] = field(default_factory=list)
    """Answers that are still to come."""

    @classmethod
    def begin(
        cls,
        terms: Terms,
        messages: Mapping[Any, Begin],
        *,
        epoch: int,
        request: Begin,
        manifest: WireManifest | None,
        end: float,
        **fields: Any,
    ) -> Self | None:
        """Send each its `Begin`: all open it, or none; None when their manifest is needed first.

        manifest: for those that have not seen it, where somebody has.
        """
        # An id of our own: the trainer's may be begun twice, and what has ended once stays ended.
        inner_id = f"{request.session_id[:96]}.{secrets.token_hex(4)}"
        messages = {
            member: msgspec.structs.replace(message, session_id=inner_id)
            for member, message in messages.items()
        }
        answers = ask_all(terms, messages, end)
        needy = [m for m, reply in answers.replies.items() if reply.need_manifest]
        if needy and manifest is not None:
            again = {m: msgspec.structs.replace(messages[m], manifest=manifest) for m in needy}
            second = ask_all(terms, again, end)
            for member in needy:
                answers.replies.pop(member)
            answers.replies.update(second.replies)
            answers.errors.update(second.errors)
            answers.gone.update(second.gone)
        replies = answers.replies.values()
        session = cls(
            terms=terms,
            inner_id=inner_id,
            request=request,
            manifest=manifest,
            epoch=epoch,
            version=max((reply.version for reply in replies), default=0),
            # Where no answer came in time the session may be open all the same: it is ended without its epoch.
            epochs=dict.fromkeys(answers.errors, 0)
            | {member: reply.epoch for member, reply in answers.replies.items()},
            **fields,
        )
        lost = bool(answers.gone) and not terms.spare
        if answers.errors or not answers.replies or lost:
            session.abort("another one did not begin")
            answers.raise_loss()
        if any(reply.need_manifest for reply in replies):
            session.abort("the manifest is needed first")
            return None
        if any(reply.version != session.version for reply in replies):
            # They serve different versions; from this update on they serve the same one.
            session.abort("the versions differ")
            messages = {
                member: msgspec.structs.replace(message, version=session.version)
                for member, message in messages.items()
            }
            return cls.begin(
                terms,
                messages,
                epoch=epoch,
                request=request,
                manifest=manifest,
                end=end,
                **fields,
            )
        return session

    def bucket(self, message: Bucket, end: float) -> Future[BucketReply]:
        """Have all check a bucket, without waiting for them: the next one may follow at once."""
        for asked in self._buckets:
            for future in asked.values():
                if future.done() and isinstance(future.exception(), WeightUpdateError):
                    future.result()  # The session has failed; what comes now is in vain.
        return self._staged(message, end)

    def receive(self, message: Receive, end: float) -> Future[BucketReply]:
        """Have all receive what a plain trainer broadcasts."""
        return self._staged(message, end)

    def vote(self, message: Vote | Commit, end: float) -> None:
        """Ask all whether they can commit; one that cannot speaks for all."""
        lease_s = message.lease_s if isinstance(message, Vote) else self._commit_patience_s
        question = Vote(session_id=message.session_id, epoch=message.epoch, lease_s=lease_s)
        votes = self._tell(question, end)
        self.all_taken(end)
        self._agreed(votes, end)

    def all_taken(self, end: float) -> None:
        """Raise unless all have taken every bucket."""
        asked, self._buckets = self._buckets, []
        for answers in asked:
            self._agreed(answers, end)

    def commit(self, message: Commit, end: float) -> CommitOutcome:
        """Vote and write; raises, and nothing has changed anywhere, unless all can."""
        self.vote(message, end)
        patience_s = self._commit_patience_s
        if patience_s is None and time.monotonic() >= end:
            raise DeadlineExceeded("the votes came too late for the commit; nothing was written")
        limit_s = min(message.timeout_s, left_s(end)) if patience_s is None else patience_s
        limited = msgspec.structs.replace(message, timeout_s=limit_s)
        asked = self._tell(limited, end, patience_s=patience_s or 0.0)
        answers = self._left_out(collect(asked, end, self.terms.wait))
        failed = answers.errors if self.terms.spare else {**answers.errors, **answers.gone}
        late = {} if patience_s is None else {m: f for m, f in asked.items() if not f.done()}
        return CommitOutcome(committed=answers.replies, failed=failed, late=late)

    @property
    def _commit_patience_s(self) -> float | None:
        return self.terms.commit_patience_s or None

    def abort(self, reason: str) -> Asked:
        """End it everywhere without a trace, however late it is for the trainer; the answers are still to come.

        A member comes to it after all that it was told before. When it has answered it reads the arena no more.
        """
        message = Abort(session_id=self.request.session_id, epoch=self.epoch, reason=reason[:4096])
        return self._tell(message, 0.0, patience_s=PATIENCE_S)

    def miss(self, message: Bucket | Receive, reason: str) -> Asked:
        """End it because a message came too late to be carried out.

        What that announced may be under way: a member that refuses it leaves the group.
        """
        asked = self.abort(reason)
        self._tell(message, 0.0, patience_s=PATIENCE_S)
        return asked

    def check(self, message: Any) -> None:
        """`SessionError` unless the message is of this session."""
        got, expected = (message.session_id, message.epoch), (self.request.session_id, self.epoch)
        if got[0] != expected[0] or got[1] not in (0, expected[1]):
            raise SessionError(
                f"no such session: got {got[0]!r} (epoch {got[1]}), expected {expected[0]!r} (epoch {expected[1]}); "
                "begin a new one"
            )

    def _staged(self, message: Any, end: float) -> Future[BucketReply]:
        asked = self._tell(message, end)
        self._buckets.append(asked)
        return joint_answer(asked, end, spare=self.terms.spare)

    def _tell(self, message: Any, end: float, patience_s: float = 0.0) -> Asked:
        messages = {
            member: msgspec.structs.replace(message, session_id=self.inner_id, epoch=epoch)
            for member, epoch in self.epochs.items()
        }
        return tell_all(messages, patience_s or self.terms.patience_s or left_s(end))

    def _agreed(self, asked: Asked, end: float) -> None:
        """Raise unless all who must have said yes."""
        answers = self._left_out(collect(asked, end, self.terms.wait))
        answers.check(spare=self.terms.spare)
        answers.compare_received()
        if not answers.replies:
            raise EngineDiedError("all that took part in the update have died")

    def _left_out(self, answers: Answers) -> Answers:
        """Who has died takes no further part."""
        for member in answers.gone:
            self.epochs.pop(member, None)
        return answers


def next_version(request: Begin, served: int) -> int:
    """The version that `request` asks for where `served` serves; `StaleVersionError` where that cannot be."""
    version = served + 1 if request.version is None else request.version
    if version <= served:
        raise StaleVersionError(
            f"versions only grow: got {version}, expected more than {served}, which is served; leave version out to "
            "get the next one"
        )
    if request.base_version not in (None, served):
        raise StaleVersionError(
            f"the update is for another base: got base_version {request.base_version}, expected {served}, which is "
            "served; ask engine_info() and decide again"
        )
    return version
