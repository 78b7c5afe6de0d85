"""One update session on several replicas: staged on all, voted by all, committed by all that live."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from weight_sync.errors import EngineDiedError, SessionError, WeightUpdateError
from weight_sync.wire.messages import (
    Abort,
    Ack,
    Begin,
    Bucket,
    BucketReply,
    Commit,
    CommitReply,
    Receive,
    Vote,
    WireManifest,
)

from .members import Answers, Asked, Member, ask_all, collect, joint_answer, tell_all

ABORT_PATIENCE_S = 600.0
"""How long a replica may take before it comes to the end of a session."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a commit."""

    committed: Mapping[Member, CommitReply]
    """Who serves the new version."""
    failed: Mapping[Member, Exception]
    """Who voted for it and then could not."""

    @property
    def reply(self) -> CommitReply:
        """The answer to the trainer: durations are those of the slowest."""
        replies = list(self.committed.values())
        slowest = {
            name: max(getattr(reply, name) for reply in replies)
            for name in (
                "stage_s",
                "copy_s",
                "verify_s",
                "pause_s",
                "begin_to_committed_s",
                "begin_to_verified_s",
            )
        }
        return msgspec.structs.replace(replies[0], **slowest)


@dataclass(slots=True, kw_only=True)
class FleetUpdate:
    """An open session. Used by the thread of `FleetWeights` alone."""

    request: Begin
    """As the trainer sent it."""
    epoch: int
    """The pool's number of it."""
    version: int
    """Version to be."""
    epochs: dict[Member, int]
    """Who takes part, and each one's own epoch."""
    manifest: WireManifest | None
    """The arena's layout; None: the engines' own."""
    present: np.ndarray
    """Which tensors of the manifest are staged, bool."""
    declared: np.ndarray
    """Their fingerprints, uint64."""
    opaque: bool = False
    """Some of it came without fingerprints: from a plain trainer."""
    _buckets: list[Asked] = field(default_factory=list)
    """Answers that are still to come."""

    @classmethod
    def begin(
        cls,
        request: Begin,
        *,
        epoch: int,
        version: int,
        strict: bool,
        members: Collection[Member],
        manifest: WireManifest | None,
        num_rows: int,
        end: float,
    ) -> FleetUpdate | None:
        """Open it on all `members`, or on none; None when their manifest is needed first.

        manifest: for those that have not seen it, where the pool has. num_rows: its tensors.
        """
        messages = {
            member: msgspec.structs.replace(
                request,
                version=version,
                base_version=None,
                strict=strict,
                arena_id=member.arenas[request.arena_id],
            )
            for member in members
        }
        answers = ask_all(messages, end)
        again = {
            member: msgspec.structs.replace(messages[member], manifest=manifest)
            for member, reply in answers.replies.items()
            if reply.need_manifest and manifest is not None
        }
        if again:
            second = ask_all(again, end)
            for member in again:
                answers.replies.pop(member)
            answers.replies.update(second.replies)
            answers.errors.update(second.errors)
            answers.gone.update(second.gone)
        # Where no answer came in time the session may be open all the same, and is ended without its epoch.
        opened = dict.fromkeys(answers.errors, 0)
        opened |= {member: reply.epoch for member, reply in answers.replies.items()}
        update = cls(
            request=request,
            epoch=epoch,
            version=version,
            epochs=opened,
            manifest=manifest,
            present=np.zeros(num_rows, dtype=bool),
            declared=np.zeros(num_rows, dtype=np.uint64),
        )
        if answers.errors or not answers.replies:
            update.abort("another replica did not begin")
            answers.raise_refusal()
        if any(reply.need_manifest for reply in answers.replies.values()):
            update.abort("the manifest is needed first")
            return None
        return update

    def bucket(self, message: Bucket, end: float) -> Future[BucketReply]:
        """Have all check a bucket, without waiting for them: the next one may follow at once."""
        for asked in self._buckets:
            for future in asked.values():
                if future.done() and isinstance(future.exception(), WeightUpdateError):
                    future.result()  # The session has failed; what comes now is in vain.
        asked = self._tell(message, end)
        self._buckets.append(asked)
        indices = np.frombuffer(message.indices, dtype="<u4")
        self.present[indices] = True
        self.declared[indices] = np.frombuffer(message.fingerprints, dtype="<u8")
        return joint_answer(asked, end)

    def receive(self, message: Receive, end: float) -> Future[BucketReply]:
        """Have all receive what a plain trainer broadcasts."""
        self.opaque = True
        asked = self._tell(message, end)
        self._buckets.append(asked)
        return joint_answer(asked, end)

    def vote(self, message: Vote | Commit, end: float) -> Ack:
        """Ask all whether they can commit; one that cannot speaks for all."""
        votes = self._tell(Vote(session_id=message.session_id, epoch=message.epoch), end)
        for asked in self._buckets:
            self._agreed(asked, end)
        self._buckets.clear()
        self._agreed(votes, end)
        return Ack()

    def commit(self, message: Commit, end: float) -> Outcome:
        """Vote and write; raises, and nothing has changed anywhere, unless all can."""
        self.vote(message, end)
        answers = self._left_out(collect(self._tell(message, end), end))
        return Outcome(committed=answers.replies, failed=answers.errors)

    def abort(self, reason: str) -> Asked:
        """End it everywhere without a trace, however late it is for the trainer; the answers are still to come.

        A replica comes to it after all that it was told before. When it has answered it reads the arena no more.
        """
        message = Abort(session_id=self.request.session_id, epoch=self.epoch, reason=reason[:4096])
        return self._tell(message, time.monotonic() + ABORT_PATIENCE_S)

    def check(self, message: Any) -> None:
        """`SessionError` unless the message is of this session."""
        got, expected = (message.session_id, message.epoch), (self.request.session_id, self.epoch)
        if got[0] != expected[0] or got[1] not in (0, expected[1]):
            raise SessionError(
                f"no such session: got {got[0]!r} (epoch {got[1]}), expected {expected[0]!r} (epoch {expected[1]}); "
                "begin a new one"
            )

    def _tell(self, message: Any, end: float) -> Asked:
        messages = {
            member: msgspec.structs.replace(message, epoch=epoch)
            for member, epoch in self.epochs.items()
        }
        return tell_all(messages, end)

    def _agreed(self, asked: Asked, end: float) -> None:
        """Raise unless all who live said yes, and somebody does."""
        answers = self._left_out(collect(asked, end))
        answers.raise_refusal()
        if not answers.replies:
            raise EngineDiedError("every replica that took part in the update has died")

    def _left_out(self, answers: Answers) -> Answers:
        """Who has died takes no further part."""
        for member in answers.gone:
            self.epochs.pop(member, None)
        return answers


def first_error(outcome: Outcome) -> Exception:
    """Why nobody has committed."""
    for error in outcome.failed.values():
        return error
    return WeightUpdateError("every replica died during the commit; start new ones")
