"""One service in front of many ranks: what a trainer tells an engine, every rank of it is told.

Rank 0 has it; the trainer need not know how many ranks there are. Each rank opens the trainer's arena itself, checks
what is staged, and votes. Only when all have voted do all commit, at one boundary of their common order.
"""

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec

from ..errors import (
    DeadlineExceeded,
    EngineDiedError,
    FingerprintMismatch,
    ProtocolError,
    SyncError,
)
from ..publisher.channel import Channel
from ..wire.messages import (
    Abort,
    Begin,
    Bucket,
    CloseArena,
    Commit,
    GetFingerprint,
    GetIgnored,
    Hello,
    JoinGroup,
    LeaveGroup,
    OpenArena,
    Receive,
    Vote,
)
from ..wire.rpc_wire import Call
from .call_queue import CallQueue, answer_later

logger = logging.getLogger(__name__)

_KEPT_EPOCHS = 64
_RANK_PATIENCE_S = 600.0
"""How long a rank may take before it comes to a message; callers wait for their own deadlines only."""


@dataclass(slots=True)
class _Opened:
    """A session that all ranks have opened."""

    begin: Begin
    """How."""
    epochs: list[int]
    """Its number at every rank."""
    vote_ends: float = 0.0
    """When it ends without a commit, once they have voted; `time.monotonic()`."""


class RankedService:
    """Serves trainers on behalf of all ranks; `ranks[0]` is this process's own.

    `handle` returns at once, like `WeightService.handle`. Calls are worked off in order on one thread.
    """

    def __init__(
        self,
        ranks: Sequence[Channel],
        *,
        name: str = "ranks",
        on_lost: Callable[[Exception], None] = lambda error: None,
    ) -> None:
        """`on_lost` hears of it when a rank cannot go on, and with it the engine."""
        self._ranks = tuple(ranks)
        self._on_lost = on_lost
        self._arenas: dict[int, list[int]] = {}  # rank 0's arena id -> every rank's
        self._sessions: OrderedDict[int, _Opened] = OrderedDict()  # by rank 0's epoch
        self._voted: _Opened | None = None
        self._actions: dict[type, Callable[[Any, float], Any]] = {
            Hello: self._ask_rank_0,
            GetIgnored: self._ask_rank_0,
            GetFingerprint: self._tell_each,
            OpenArena: self._open_arena,
            CloseArena: self._close_arena,
            Begin: self._begin,
            Bucket: self._stage,
            Receive: self._stage,
            JoinGroup: self._join,
            LeaveGroup: self._tell_each,
            Vote: self._vote,
            Abort: self._abort,
            Commit: self._commit,
        }
        self._queue = CallQueue(
            f"{name}-front",
            serve=self._serve,
            pause=self._vote_left_s,
            idle=self._end_late_vote,
            end=lambda: None,
        )

    def handle(self, call: Call) -> None:
        """Queue a call; any thread. Its body is one of `messages.WeightRequest`."""
        self._queue.put(call)

    def close(self) -> None:
        """Stop, fail what is queued or under way, and close the channels. Safe to repeat."""
        self._queue.close()
        for rank in self._ranks:
            rank.close()

    def _serve(self, call: Call) -> None:
        body = call.body
        try:
            if call.deadline <= time.monotonic():
                raise self._missed(body)
            action = self._actions.get(type(body))
            if action is None:
                raise ProtocolError(f"not a message about weights: got {type(body).__name__}")
            answer = action(body, call.deadline)
            if isinstance(answer, Future):
                answer.add_done_callback(partial(answer_later, call))
            else:
                call.reply(answer)
        except (SyncError, ValueError) as error:  # a refusal
            call.fail(error)
        except Exception as error:  # whatever it was, the service goes on and the caller is told
            logger.exception("%s failed", type(body).__name__)
            call.fail(error)

    def _missed(self, message: Any) -> DeadlineExceeded:
        late = DeadlineExceeded(
            f"{type(message).__name__} waited too long for its turn and was not carried out"
        )
        if isinstance(message, Bucket | Receive):
            # What it announced may be under way: a rank that refuses it leaves the group.
            self._abort_all(message, str(late))
            for rank, told in zip(self._ranks, self._with_epochs(message), strict=True):
                rank.submit(told, _RANK_PATIENCE_S)
        return late

    # ---- messages --------------------------------------------------------------------------------------------------

    def _ask_rank_0(self, message: Any, end: float) -> Any:
        return self._ranks[0].call(message, _left(end))

    def _tell_each(self, message: Any, end: float) -> Any:
        return self._tell_all([message] * len(self._ranks), end)[0]

    def _join(self, message: JoinGroup, end: float) -> "Future[Any]":
        """Joining waits for other processes: the answer comes later, and other calls go on meanwhile."""
        joined: Future[Any] = Future()
        futures = [rank.submit(message, _RANK_PATIENCE_S) for rank in self._ranks]

        def done(future: "Future[Any]") -> None:
            error = future.exception()
            with joining:
                if error is not None and not joined.done():
                    joined.set_exception(error)
                elif all(f.done() for f in futures) and not joined.done():
                    joined.set_result(future.result())

        joining = threading.Lock()
        for future in futures:
            future.add_done_callback(done)
        return joined

    def _open_arena(self, message: OpenArena, end: float) -> Any:
        replies = self._tell_all([message] * len(self._ranks), end)
        self._arenas[replies[0].arena_id] = [reply.arena_id for reply in replies]
        return replies[0]

    def _close_arena(self, message: CloseArena, end: float) -> Any:
        ids = self._arenas.pop(message.arena_id, [message.arena_id] * len(self._ranks))
        return self._tell_all([CloseArena(arena_id=arena_id) for arena_id in ids], end)[0]

    def _begin(self, message: Begin, end: float) -> Any:
        ids = self._arenas.get(message.arena_id, [message.arena_id] * len(self._ranks))
        messages = [msgspec.structs.replace(message, arena_id=arena_id) for arena_id in ids]
        replies, error = self._ask_all(messages, end)
        opened = [reply is not None and not reply.need_manifest for reply in replies]
        if error is None and all(opened):
            self._sessions[replies[0].epoch] = _Opened(message, [reply.epoch for reply in replies])
            self._voted = None  # whatever there was has ended on all ranks
            while len(self._sessions) > _KEPT_EPOCHS:
                self._sessions.popitem(last=False)
            return replies[0]
        # Not on all ranks, so on none; also where the answer is late, because an abort comes after what it ends.
        reason = "another rank did not begin"
        abort = Abort(session_id=message.session_id, epoch=0, reason=reason)
        for rank in self._ranks:
            rank.submit(abort, _RANK_PATIENCE_S)
        if error is not None:
            raise error
        return next(reply for reply in replies if reply.need_manifest)

    def _stage(self, message: Bucket | Receive, end: float) -> Any:
        replies = self._all_or_none(message, end)
        if any(reply.received != replies[0].received for reply in replies):
            reason = "the ranks received different bytes over the group"
            self._abort_all(message, reason)
            raise FingerprintMismatch(f"{reason}; make a new group and send again")
        return replies[0]

    def _vote(self, message: Vote, end: float) -> Any:
        reply = self._all_or_none(message, end)[0]
        voted = self._sessions.get(message.epoch)
        if voted is not None and voted.begin.session_id == message.session_id:
            voted.vote_ends = time.monotonic() + voted.begin.lease_s
            self._voted = voted
        return reply

    def _abort(self, message: Abort, end: float) -> Any:
        return self._tell_all(self._with_epochs(message), end)[0]

    def _commit(self, message: Commit, end: float) -> Any:
        self._all_or_none(Vote(session_id=message.session_id, epoch=message.epoch), end)
        self._voted = None  # now it ends in any case
        limited = msgspec.structs.replace(message, timeout_s=min(message.timeout_s, _left(end)))
        return self._tell_all(self._with_epochs(limited), end)[0]

    # ---- the session, as all ranks see it ----------------------------------------------------------------------------

    def _all_or_none(self, message: Any, end: float) -> list[Any]:
        """Every rank's reply to a message of a session; when one refuses it, the session ends on all of them."""
        replies, refusal = self._ask_all(self._with_epochs(message), end)
        if refusal is not None:
            self._abort_all(message, f"a rank refused {type(message).__name__}: {refusal}")
            raise refusal
        return replies

    def _abort_all(self, message: Any, reason: str) -> None:
        """End the session of `message` on all ranks, without waiting for them; what comes next comes after it."""
        abort = Abort(session_id=message.session_id, epoch=message.epoch, reason=reason[:4096])
        for rank, told in zip(self._ranks, self._with_epochs(abort), strict=True):
            rank.submit(told, _RANK_PATIENCE_S)

    def _vote_left_s(self) -> float | None:
        return None if self._voted is None else max(0.0, self._voted.vote_ends - time.monotonic())

    def _end_late_vote(self) -> None:
        """No rank may end by itself what it has voted for: rank 0's clock is the one that counts."""
        voted = self._voted
        if voted is not None and self._vote_left_s() == 0.0:
            self._voted = None
            vote = Vote(session_id=voted.begin.session_id, epoch=voted.epochs[0])
            self._abort_all(vote, f"no commit came for its lease of {voted.begin.lease_s} s")

    # ---- ranks -----------------------------------------------------------------------------------------------------

    def _with_epochs(self, message: Any) -> list[Any]:
        opened = self._sessions.get(message.epoch)
        epochs = [message.epoch] * len(self._ranks) if opened is None else opened.epochs
        return [msgspec.structs.replace(message, epoch=epoch) for epoch in epochs]

    def _tell_all(self, messages: Sequence[Any], end: float) -> list[Any]:
        """Every rank's reply; raises the first error, after all have answered."""
        replies, error = self._ask_all(messages, end)
        if error is not None:
            raise error
        return replies

    def _ask_all(self, messages: Sequence[Any], end: float) -> tuple[list[Any], Exception | None]:
        """Every rank's reply, None where it failed, and the first error by rank. Rank 0 is told last.

        What one rank is told all carry out, even when the caller has given up by then: some messages are collectives.
        """
        futures = [
            rank.submit(message, _RANK_PATIENCE_S)
            for rank, message in reversed(list(zip(self._ranks, messages, strict=True)))
        ]
        replies: list[Any] = []
        first: Exception | None = None
        for future in reversed(futures):
            try:
                replies.append(self._queue.wait(future, _left(end)))
            except TimeoutError as error:
                replies.append(None)
                first = first or DeadlineExceeded(f"a rank did not answer in time: {error}")
            except Exception as error:
                replies.append(None)
                first = first or error
                if isinstance(error, EngineDiedError):
                    self._on_lost(error)
        return replies, first


def _left(end: float) -> float:
    return max(0.001, end - time.monotonic())
