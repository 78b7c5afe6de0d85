"""One service in front of many ranks: what a trainer tells an engine, every rank of it is told.

Rank 0 has it; the trainer need not know how many ranks there are. Each rank opens the trainer's arena itself, checks
what is staged, and votes. Only when all have voted do all commit, at one boundary of their common order.
"""

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from ..errors import DeadlineExceeded, EngineDiedError, ProtocolError, SyncError
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

logger = logging.getLogger(__name__)

_KEPT_EPOCHS = 64
_RANK_PATIENCE_S = 600.0
"""How long a rank may take before it comes to a message; callers wait for their own deadlines only."""


class RankedService:
    """Serves trainers on behalf of all ranks; `ranks[0]` is this process's own.

    `handle` returns at once, like `WeightService.handle`. Calls are worked off in order on one thread.
    """

    def __init__(self, ranks: Sequence[Channel], *, name: str = "ranks") -> None:
        self._ranks = tuple(ranks)
        self._arenas: dict[int, list[int]] = {}  # rank 0's arena id -> every rank's
        self._epochs: OrderedDict[int, list[int]] = OrderedDict()  # rank 0's epoch -> every rank's
        self._queue: deque[Call] = deque()
        self._wanted = threading.Condition()
        self._closing = False
        self._actions: dict[type, Callable[[Any, float], Any]] = {
            Hello: self._ask_rank_0,
            GetIgnored: self._ask_rank_0,
            GetFingerprint: lambda message, end: self._tell_all([message] * len(self._ranks), end)[
                0
            ],
            OpenArena: self._open_arena,
            CloseArena: self._close_arena,
            Begin: self._begin,
            Bucket: self._in_session,
            Receive: self._in_session,
            JoinGroup: self._tell_each,
            LeaveGroup: self._tell_each,
            Vote: self._in_session,
            Abort: self._in_session,
            Commit: self._commit,
        }
        self._thread = threading.Thread(target=self._run, name=f"{name}-front", daemon=True)
        self._thread.start()

    def handle(self, call: Call) -> None:
        """Queue a call; any thread. Its body is one of `messages.WeightRequest`."""
        with self._wanted:
            if not self._closing:
                self._queue.append(call)
                self._wanted.notify()
                return
        call.fail(EngineDiedError("the engine was shut down; connect to a new one"))

    def close(self) -> None:
        """Stop, fail what is queued, and close the channels. Safe to repeat."""
        with self._wanted:
            self._closing = True
            self._wanted.notify()
        self._thread.join(timeout=30.0)
        for rank in self._ranks:
            rank.close()

    def _run(self) -> None:
        while True:
            with self._wanted:
                self._wanted.wait_for(lambda: self._queue or self._closing)
                if self._closing:
                    break
                call = self._queue.popleft()
            self._serve(call)
        while self._queue:
            self._queue.popleft().fail(
                EngineDiedError("the engine was shut down; connect to a new one")
            )

    def _serve(self, call: Call) -> None:
        body = call.body
        try:
            if call.deadline <= time.monotonic():
                raise DeadlineExceeded(
                    f"{type(body).__name__} waited too long for its turn and was not carried out"
                )
            action = self._actions.get(type(body))
            if action is None:
                raise ProtocolError(f"not a message about weights: got {type(body).__name__}")
            call.reply(action(body, call.deadline))
        except (SyncError, ValueError) as error:  # a refusal
            call.fail(error)
        except Exception as error:  # whatever it was, the service goes on and the caller is told
            logger.exception("%s failed", type(body).__name__)
            call.fail(error)

    # ---- messages --------------------------------------------------------------------------------------------------

    def _ask_rank_0(self, message: Any, end: float) -> Any:
        return self._ranks[0].call(message, _left(end))

    def _tell_each(self, message: Any, end: float) -> Any:
        return self._tell_all([message] * len(self._ranks), end)[0]

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
            self._epochs[replies[0].epoch] = [reply.epoch for reply in replies]
            while len(self._epochs) > _KEPT_EPOCHS:
                self._epochs.popitem(last=False)
            return replies[0]
        # Not on all ranks, so on none; also where the answer is late, because an abort comes after what it ends.
        reason = "another rank did not begin"
        abort = Abort(session_id=message.session_id, epoch=0, reason=reason)
        for rank in self._ranks:
            rank.submit(abort, _RANK_PATIENCE_S)
        if error is not None:
            raise error
        return next(reply for reply in replies if reply.need_manifest)

    def _in_session(self, message: Any, end: float) -> Any:
        return self._tell_all(self._with_epochs(message), end)[0]

    def _commit(self, message: Commit, end: float) -> Any:
        vote = Vote(session_id=message.session_id, epoch=message.epoch)
        _, refusal = self._ask_all(self._with_epochs(vote), end)
        if refusal is not None:
            abort = Abort(
                session_id=message.session_id,
                epoch=message.epoch,
                reason=f"a rank voted against the commit: {refusal}",
            )
            self._ask_all(self._with_epochs(abort), end)
            raise refusal
        limited = msgspec.structs.replace(message, timeout_s=min(message.timeout_s, _left(end)))
        return self._tell_all(self._with_epochs(limited), end)[0]

    # ---- ranks -----------------------------------------------------------------------------------------------------

    def _with_epochs(self, message: Any) -> list[Any]:
        epochs = self._epochs.get(message.epoch, [message.epoch] * len(self._ranks))
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
                replies.append(future.result(_left(end)))
            except TimeoutError as error:
                replies.append(None)
                first = first or DeadlineExceeded(f"a rank did not answer in time: {error}")
            except Exception as error:
                replies.append(None)
                first = first or error
        return replies, first


def _left(end: float) -> float:
    return max(0.001, end - time.monotonic())
