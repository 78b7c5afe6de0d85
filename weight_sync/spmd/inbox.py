"""Where rank 0 hears the ranks of its trainer: messages by update and kind, deaths, deadlines, and one answer for all.

Ranks talk to it over connections, not through collectives of the trainer's groups: each message has an id and a
deadline, a rank that died is noticed while it is waited for, and a failure leaves no group out of step.
"""

from __future__ import annotations

import hmac
import threading
from collections import defaultdict
from typing import Any

from ..errors import ERRORS, DeadlineExceeded, SessionError, TrainerDiedError
from ..wire.deadline import Deadline
from ..wire.messages import ErrorReply, ProcessRef
from ..wire.process import why_dead
from ..wire.rpc import Call, RpcServer
from ..wire.rpc_wire import raised
from .messages import Failed, Heard, Noted, Offer, RankRequest, Wrote

_LOOK_S = 0.1
_REMEMBERED = 64
"""Updates whose error is still told to a rank that comes late: others may be ahead by several that failed at once."""
_FAREWELL_S = 5.0
"""How long a closing rank 0 waits until the others have heard how the last update ended."""


class RankInbox:
    """Serves the connections; one thread gathers. An update that is over is answered at once, with its error."""

    def __init__(self, num_ranks: int, *, secret: bytes) -> None:
        self._num_ranks = num_ranks
        self._secret = secret
        self._changed = threading.Condition()
        self._calls: dict[tuple[int, str], dict[int, Call]] = defaultdict(dict)
        self._failure: dict[int, BaseException] = {}
        self._done = 0
        self._heard: dict[int, int] = {}
        self._processes: dict[int, ProcessRef] = {}
        self._server = RpcServer(self._handle, RankRequest, name="spmd")
        self._server.start()

    @property
    def address(self) -> str:
        """Where ranks connect."""
        return self._server.address

    def _handle(self, call: Call) -> None:
        """On the I/O thread: note what came, and answer what needs no decision."""
        body: Any = call.body
        if not hmac.compare_digest(body.secret, self._secret) or body.rank >= self._num_ranks:
            raise SessionError(
                f"not a rank of this trainer: got rank {body.rank}, expected one of {self._num_ranks} that were told "
                "the secret over the mesh; make the publisher on every rank"
            )
        with self._changed:
            if isinstance(body, Heard | Failed):
                self._heard[body.rank] = body.update
                self._changed.notify_all()
            if body.update <= self._done and isinstance(body, Heard | Failed):
                call.reply(Noted())
                return
            if body.update <= self._done:
                error = self._failure.get(body.update) or SessionError(
                    f"update {body.update} is over: got a message of rank {body.rank} for it, expected one for "
                    f"update {self._done + 1}; every rank must publish as often as the others"
                )
                call.fail(error)
                return
            if isinstance(body, Offer):
                self._processes[body.rank] = body.process
            if isinstance(body, Failed):
                message = f"{body.message} (on rank {body.rank} of the trainer's mesh)"
                failure = raised(ErrorReply(code=body.code, message=message), ERRORS)
                self._failure.setdefault(body.update, failure)
            kind = type(body).__name__
            if isinstance(body, Wrote):
                kind += str(body.bucket)
            self._calls[body.update, kind][body.rank] = call
            self._changed.notify_all()
        if isinstance(body, Wrote | Failed):
            call.reply(Noted())

    def gather(
        self, update: int, kind: type, deadline: Deadline, number: int | None = None
    ) -> list[Call]:
        """That message of every rank, in the order of ranks."""
        name = kind.__name__ + ("" if number is None else str(number))
        with self._changed:
            while True:
                if update in self._failure:
                    raise self._failure[update]
                calls = self._calls[update, name]
                if len(calls) == self._num_ranks:
                    return [calls[rank] for rank in range(self._num_ranks)]
                missing = [rank for rank in range(self._num_ranks) if rank not in calls]
                self._check_alive(missing)
                try:
                    left_s = deadline.left_s("publish")
                except DeadlineExceeded:
                    raise DeadlineExceeded(
                        f"ranks {missing} of the mesh did not come to {kind.__name__!r} of update {update}: got "
                        f"{len(calls)} of {self._num_ranks} in {deadline.timeout_s:.1f} s, expected every rank to "
                        "publish at the same point; look at what keeps them, or raise timeout_s"
                    ) from None
                self._changed.wait(min(left_s, _LOOK_S))

    def _wait_until_heard(self, deadline: Deadline) -> None:
        """A connection that closes may take its last replies with it."""
        with self._changed:
            for rank, process in list(self._processes.items()):
                while self._heard.get(rank, 0) < self._done and why_dead(process) is None:
                    try:
                        self._changed.wait(min(deadline.left_s("close"), _LOOK_S))
                    except DeadlineExceeded:
                        return

    def _check_alive(self, ranks: list[int]) -> None:
        for rank in ranks:
            process = self._processes.get(rank)
            why = None if process is None else why_dead(process)
            if why is not None:
                raise TrainerDiedError(
                    f"rank {rank} of the trainer's mesh is gone ({why}): got no shards of it, expected every rank to "
                    "publish; nothing was written; restart the trainer"
                )

    def finish(self, update: int) -> None:
        """The update is over; the caller holds the calls that are still to be answered."""
        with self._changed:
            self._done = update
            self._forget(update)

    def close(self, reason: BaseException) -> None:
        """Fail whoever waits, and stop serving."""
        with self._changed:
            waiting = {update for update, _ in self._calls}
        for update in sorted(waiting):
            self.fail(update, reason)
        self._wait_until_heard(Deadline(_FAREWELL_S))
        self._server.close()

    def fail(self, update: int, error: BaseException) -> None:
        """Tell all ranks, those too that come late."""
        with self._changed:
            self._failure[update] = error
            self._done = max(self._done, update)
            calls = [
                call
                for (of, _), by_rank in self._calls.items()
                if of <= update
                for call in by_rank.values()
            ]
            self._forget(update)
        for call in calls:
            call.fail(error)

    def _forget(self, update: int) -> None:
        for key in [key for key in self._calls if key[0] <= update]:
            del self._calls[key]
        for old in [old for old in self._failure if old <= update - _REMEMBERED]:
            del self._failure[old]
