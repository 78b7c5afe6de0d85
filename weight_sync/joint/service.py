"""One service in front of many: what a trainer tells it, every member is told, and they answer as one."""

from __future__ import annotations

import itertools
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import msgspec
import torch

from ..errors import (
    DeadlineExceeded,
    ProtocolError,
    SessionError,
    TransportError,
    WeightUpdateError,
)
from ..time_left import left_s
from ..wire import messages as msg
from ..wire.call_queue import CallQueue
from ..wire.futures import resolve, wait
from ..wire.local_call import LocalCall
from ..wire.rpc_wire import Call
from .arenas import JointArenas
from .members import Answers, Asked, Member, ask_all, collect, same
from .session import CommitOutcome, JointSession

_KEPT = 32


class JointService:
    """Serves trainers on behalf of its members; calls are worked off in order on one thread.

    An update is begun by all or by none. All check what is staged; a refusal by one ends the session everywhere. When
    all have voted, and not before, all commit. `handle` returns at once, like `WeightService.handle`.
    """

    patience_s = 0.0
    """See `members.Terms`."""
    spare = False
    """Likewise."""
    commit_patience_s = 0.0
    """Likewise."""
    in_step = False
    """Members take what belongs to a session one at a time: a refusal is known, and told to all, before the next."""
    what = "engine"
    """What a trainer believes to talk to, for error messages."""

    def __init__(self, members: Sequence[Any], *, name: str) -> None:
        self._members = list(members)
        self._arenas = JointArenas(self)
        self._epochs = itertools.count(1)
        self._manifests: OrderedDict[str, msg.WireManifest] = OrderedDict()
        self._session: JointSession | None = None
        self._aborted: tuple[str, Asked] = "", {}  # the last session that was, and the answers
        self._endings: OrderedDict[str, tuple[type[Exception], tuple[Any, ...]]] = OrderedDict()
        self._actions: dict[type, Callable[[Any, float], Any]] = {
            msg.Hello: self._hello,
            msg.GetIgnored: self._ask_one,
            msg.OpenArena: lambda m, end: self._arenas.open(m, self._members, end),
            msg.CloseArena: self._close_arena,
            msg.JoinGroup: self._join,
            msg.LeaveGroup: lambda m, end: self._arenas.leave(m, self._members, end),
            msg.Begin: self._begin,
            msg.Bucket: self._in_session,
            msg.Receive: self._in_session,
            msg.Vote: self._in_session,
            msg.Abort: self._abort,
            msg.Commit: self._commit,
            msg.SetLabel: self._set_label,
            msg.GetFingerprint: self._fingerprint,
        }
        self._vote_ends: float | None = None  # while a vote waits for its commit
        self._queue = CallQueue(
            f"{name}-front",
            serve=self._serve,
            missed=self._missed,
            pause=self._vote_left_s,
            idle=self._end_late_vote,
            end=lambda: None,
            what=self.what,
        )

    # ---- any thread --------------------------------------------------------------------------------------------------

    def handle(self, call: Call) -> None:
        """Queue a call; its body is one of `messages.WeightRequest`."""
        self._queue.put(call)

    def do(self, action: Callable[[], None]) -> Future[None]:
        """Run `action` between two calls."""
        done: Future[None] = Future()
        self._queue.put(LocalCall(lambda: resolve(done, action), math.inf, future=done))
        return done

    def known_as(self, session_id: str) -> str | None:
        """What the members call a session, while it is the open one."""
        session = self._session
        mine = session is not None and session.request.session_id == session_id
        return session.inner_id if session is not None and mine else None

    @property
    def closed(self) -> bool:
        """It takes no more calls."""
        return self._queue.closed

    def close(self, *, wait: bool = True) -> None:
        """Stop, and fail what is queued; the members' channels stay open. Safe to repeat."""
        self._queue.close()

    # ---- the thread --------------------------------------------------------------------------------------------------

    def wait(self, future: Future[Any], timeout_s: float) -> Any:
        """See `members.Terms`. Members that are told one thing at a time are heard about others meanwhile."""
        return self._queue.wait(future, timeout_s) if self.in_step else future.result(timeout_s)

    def _serve(self, call: Call) -> Any:
        body = call.body
        if callable(body):  # See `do`.
            return body()
        action = self._actions.get(type(body))
        if action is None:
            raise ProtocolError(f"not a message about weights: got {type(body).__name__}")
        return action(body, call.deadline)

    def _missed(self, message: Any, late: DeadlineExceeded) -> None:
        session = self._session
        if isinstance(message, msg.Bucket | msg.Receive) and session is not None:
            if session.request.session_id == message.session_id:
                self._aborted = message.session_id, session.miss(message, str(late))
                self._end(session, late)

    def _ask(self, messages: dict[Any, Any], end: float) -> Answers:
        return ask_all(self, messages, end)

    def _ask_one(self, message: Any, end: float) -> Any:
        answers = self._ask(same(self._members[:1], message), end)
        answers.raise_loss()
        return answers.replies[self._members[0]]

    # ---- messages ----------------------------------------------------------------------------------------------------

    def _hello(self, message: msg.Hello, end: float) -> msg.EngineInfo:
        info: msg.EngineInfo = self._ask_one(message, end)
        return info

    def _join(self, message: msg.JoinGroup, end: float) -> msg.Ack:
        return self._arenas.join(message, self._members, end)

    def _close_arena(self, message: msg.CloseArena, end: float) -> msg.Ack:
        return self._arenas.close(message, self._members, end)

    def _set_label(self, message: msg.SetLabel, end: float) -> msg.Ack:
        limited = msgspec.structs.replace(message, timeout_s=min(message.timeout_s, left_s(end)))
        answers = self._ask(same(self._members, limited), end)
        answers.check(spare=self.spare)
        return msg.Ack()

    def _fingerprint(self, message: msg.GetFingerprint, end: float) -> msg.FingerprintReply:
        return self._one_fingerprint(self._members, message, end)

    def _one_fingerprint(
        self, members: Sequence[Any], message: msg.GetFingerprint, end: float
    ) -> msg.FingerprintReply:
        """What all of them hold; `WeightUpdateError` where that is not the same."""
        answers = self._ask(same(members, message), end)
        answers.check(spare=self.spare)
        found = {member.name: reply.fingerprint for member, reply in answers.replies.items()}
        if len(set(found.values())) > 1:
            shown = ", ".join(f"{name}: {value:#018x}" for name, value in sorted(found.items()))
            raise WeightUpdateError(
                f"they hold different weights: got {shown}, expected one value; publish a complete update"
            )
        reply: msg.FingerprintReply = next(iter(answers.replies.values()))
        return reply

    def _begin(self, message: msg.Begin, end: float) -> msg.BeginReply:
        return self._open(message, message, self._members, end)

    def _open(
        self, message: msg.Begin, each: msg.Begin, members: Sequence[Any], end: float
    ) -> msg.BeginReply:
        """Open a session with `members`, which are told `each`."""
        digest = message.manifest_digest
        if message.manifest is not None:
            self._manifests[digest] = message.manifest
            while len(self._manifests) > _KEPT:
                self._manifests.popitem(last=False)
        able = self._arenas.opened_by(message.arena_id, members, end)
        session = self._make_session(
            {m: msgspec.structs.replace(each, arena_id=m.arenas[message.arena_id]) for m in able},
            request=message,
            epoch=next(self._epochs),
            manifest=self._manifests.get(digest),
            end=end,
        )
        if session is None:
            return msg.BeginReply(epoch=0, version=each.version or 0, need_manifest=True)
        self._session = session
        self._vote_ends = None
        return msg.BeginReply(epoch=session.epoch, version=session.version, need_manifest=False)

    def _make_session(self, messages: dict[Any, msg.Begin], **fields: Any) -> JointSession | None:
        return JointSession.begin(self, messages, **fields)

    def _in_session(self, message: Any, end: float) -> Any:
        """What the session answers; a failure ends it everywhere."""
        session = self._session
        if session is None or session.request.session_id != message.session_id:
            ending = self._endings.get(message.session_id)
            if ending is not None:
                raise ending[0](*ending[1])
        if session is None:
            raise SessionError(f"no such session: got {message.session_id!r}; begin one first")
        session.check(message)
        try:
            if isinstance(message, msg.Commit):
                self._vote_ends = None  # now it ends in any case
                return session.commit(message, end)
            if isinstance(message, msg.Vote):
                session.vote(message, end)
                lease_s = max(session.request.lease_s, message.lease_s or 0.0)
                self._vote_ends = time.monotonic() + lease_s
                return msg.Ack()
            staged = (
                session.bucket(message, end)
                if isinstance(message, msg.Bucket)
                else session.receive(message, end)
            )
            if self.in_step and not self._votes_next(message):
                session.all_taken(end)
            return staged
        except Exception as error:
            self._aborted = message.session_id, session.abort(f"another one refused: {error}")
            self._end(session, error)
            raise

    def _votes_next(self, message: msg.Bucket | msg.Receive) -> bool:
        """Behind a bucket comes its session's commit: the vote, which takes nothing and needs nobody, may be asked for
        at once, and waits for the bucket itself."""
        return isinstance(message, msg.Bucket) and self._queue.next_is(
            lambda body: isinstance(body, msg.Commit) and body.session_id == message.session_id
        )

    def _abort(self, message: msg.Abort, end: float) -> msg.Ack:
        """The answer means that nobody reads the arena any more; `DeadlineExceeded` where that is not known."""
        session = self._session
        if session is not None and session.request.session_id == message.session_id:
            self._aborted = message.session_id, session.abort(message.reason)
            self._end(session, SessionError(f"the session was aborted: {message.reason}"))
        session_id, asked = self._aborted
        if session_id == message.session_id:
            collect(asked, end, self.wait).raise_refusal()
        return msg.Ack()

    def _commit(self, message: msg.Commit, end: float) -> msg.CommitReply:
        session = self._session
        outcome: CommitOutcome = self._in_session(message, end)
        assert session is not None
        if outcome.late:  # They come to it all the same: until then they may read the arena.
            self._aborted = message.session_id, outcome.late
        elif outcome.failed:  # Where no answer came in time the session may still be there.
            self._aborted = message.session_id, session.abort("the commit has failed")
        try:
            reply = self._committed(session, outcome)
        except Exception as error:
            self._end(session, error)
            raise
        why = SessionError("the session has ended: it was committed; begin a new one")
        self._end(session, why)
        return reply

    def _committed(self, session: JointSession, outcome: CommitOutcome) -> msg.CommitReply:
        """The answer to the trainer; an error if one of those who must have committed did not."""
        for error in outcome.failed.values():
            if outcome.late:
                late = ", ".join(member.name for member in outcome.late)
                error.add_note(
                    f"all have voted for version {session.version}: {late} serves it when it goes on"
                )
            if outcome.committed:
                done = ", ".join(member.name for member in outcome.committed)
                error.add_note(f"committed by {done}; publish again")
            raise error
        return outcome.reply

    def _vote_left_s(self) -> float | None:
        return None if self._vote_ends is None else max(0.0, self._vote_ends - time.monotonic())

    def _end_late_vote(self) -> None:
        """Nobody may end by itself what it has voted for: this clock is the one that counts."""
        session = self._session
        if session is not None and self._vote_left_s() == 0.0:
            why = f"no commit came for its lease of {session.request.lease_s} s"
            self._aborted = session.request.session_id, session.abort(why)
            self._end(session, SessionError(f"the session has ended: {why}; begin a new one"))

    def _end(self, session: JointSession, why: Exception) -> None:
        if self._session is session:
            self._session = None
        self._vote_ends = None
        # Without the traceback, which would keep what it saw alive.
        self._endings[session.request.session_id] = type(why), why.args
        while len(self._endings) > _KEPT:
            self._endings.popitem(last=False)


class JointChannel:
    """`wire.channel.Channel` to a service of this process; tensors go through memory that the members map."""

    is_local = False

    def __init__(self, service: JointService, *, owned: bool = False) -> None:
        """owned: closing the channel closes the service."""
        self._service = service
        self._owned = owned

    def call(self, message: Any, timeout_s: float) -> Any:
        return wait(self.submit(message, timeout_s), timeout_s, type(message).__name__)

    def submit(self, message: Any, timeout_s: float) -> Future[Any]:
        # Somewhat earlier than whoever asked gives up, to whom we say who was late.
        margin_s = min(0.2, 0.05 * timeout_s) if self._owned else 0.0
        call = LocalCall(message, time.monotonic() + timeout_s - margin_s)
        self._service.handle(call)
        return call.future

    def lend(self, buffer: torch.Tensor) -> str:
        raise TransportError("they are in other processes: they cannot read a buffer of this one")

    @property
    def dead(self) -> str | None:
        return f"the {self._service.what} was shut down" if self._service.closed else None

    def close(self, *, wait: bool = True) -> None:
        if self._owned:
            self._service.close(wait=wait)


__all__ = ["JointChannel", "JointService", "Member"]
