"""One weight update for many engines: what a trainer tells the pool, every replica is told, and all must agree.

The trainer packs its arena once; all replicas map it. A refusal by one replica before the commit ends the session on
all of them. A replica that dies is left out. One that cannot write what the others have written is behind: it is taken
out of service at once, and brought to the served version or replaced.

A `WeightPublisher` sees one engine: the pool has its own arena ids and epochs, and an identity that stays when replicas
come and go.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import msgspec

from weight_sync.errors import (
    DeadlineExceeded,
    EngineDiedError,
    SessionError,
    StaleVersionError,
    TornWeightsError,
    WeightUpdateError,
)
from weight_sync.wire import messages as msg
from weight_sync.wire.process import current_process
from weight_sync.wire.rpc import Call

from .catch_up import Served, Source, catch_up
from .fleet_arenas import FleetArenas
from .fleet_update import FleetUpdate, Outcome, first_error
from .members import GONE, Asked, Member, ask_all, collect, left, same
from .serving_thread import ServingThread

logger = logging.getLogger(__name__)

_KEPT = 32


class FleetWeights:
    """Serves trainers on behalf of all replicas; calls are worked off in order on one thread."""

    def __init__(
        self,
        *,
        label: str,
        timeout_s: float,
        on_change: Callable[[], None],
        group_host: str = "127.0.0.1",
        awaits: str | None = None,
    ) -> None:
        """`on_change()` is told, on the thread, whenever `serving`, `behind` or `lost` may have changed.

        label: of what the replicas load. timeout_s: for bringing up one replica. group_host: where replicas on other
        machines reach this one. awaits: why what the replicas load is not to be used; None: it is.
        """
        self.served = Served(version=0, label=label, fingerprint=None)
        self.lost: str | None = awaits
        """Why no replica has whole weights (their memory was released, none have come yet); None: they have."""
        self._awaits = awaits
        self.behind: dict[int, Exception] = {}
        """Replicas that do not hold the served version, and why."""
        self._engine_id = secrets.token_hex(8)
        self._timeout_s = timeout_s
        self._on_change = on_change
        self._group_host = group_host
        self._members: dict[int, Member] = {}
        self._arenas = FleetArenas()
        self._epochs = itertools.count(1)
        self._manifests: OrderedDict[str, msg.WireManifest] = OrderedDict()
        self._num_tensors = 0
        self._update: FleetUpdate | None = None
        self._aborted: tuple[str, Asked] = (
            "",
            {},
        )  # the last session that was, and its replicas' answers
        self._endings: OrderedDict[str, tuple[type[Exception], tuple[Any, ...]]] = OrderedDict()
        self._source: Source | None = None
        self._doubt: FleetUpdate | None = None
        """The last update, while no replica has said that it committed it, and some may have."""
        self._unsure: set[Member] = set()
        actions: dict[type, Callable[[Any, float], Any]] = {
            msg.Hello: self._hello,
            msg.GetIgnored: self._ask_one,
            msg.OpenArena: lambda m, end: self._arenas.open(m, self._all, end),
            msg.CloseArena: self._close_arena,
            msg.JoinGroup: lambda m, end: self._arenas.join(m, self._all, end),
            msg.LeaveGroup: lambda m, end: self._arenas.leave(m, self._all, end),
            msg.Begin: self._begin,
            msg.Bucket: lambda m, end: self._in_session(m, end, FleetUpdate.bucket),
            msg.Receive: lambda m, end: self._in_session(m, end, FleetUpdate.receive),
            msg.Vote: lambda m, end: self._in_session(m, end, FleetUpdate.vote),
            msg.Abort: self._abort,
            msg.Commit: self._commit,
            msg.GetFingerprint: self._fingerprint,
        }
        self._thread = ServingThread(actions, name="pool-weights")

    # ---- any thread --------------------------------------------------------------------------------------------------

    @property
    def serving(self) -> set[int]:
        """Replicas that hold the served version, whole."""
        return {member.number for member in self._all if member.serving}

    @property
    def closed(self) -> bool:
        """It takes no more calls."""
        return self._thread.closed

    def handle(self, call: Call) -> None:
        """Queue a trainer's call; its body is one of `messages.WeightRequest`."""
        self._thread.handle(call)

    def add(self, member: Member) -> Future[None]:
        """Take a replica in and bring it to the served version. With an error it is there, but behind."""

        def bring_up() -> None:
            self._members = {**self._members, member.number: member}
            self._bring_up(member)

        return self._thread.do(bring_up)

    def bring_up(self, number: int) -> Future[None]:
        """Once more for a replica that fell behind."""
        return self._thread.do(lambda: self._bring_up(self._members[number]))

    def remove(self, number: int) -> Future[None]:
        """Forget a replica."""

        def forget() -> None:
            member = self._members.get(number)
            self._members = {n: m for n, m in self._members.items() if n != number}
            self.behind.pop(number, None)
            if member is not None:
                self._unsure.discard(member)
            if member is not None and self._update is not None:
                self._update.epochs.pop(member, None)

        return self._thread.do(forget)

    def lose(self, reason: str) -> Future[None]:
        """No replica has whole weights any more, on purpose; the next complete update ends that."""

        def note() -> None:
            self._source = None
            self._on_change()

        self.lost = reason
        return self._thread.do(note)

    def close(self) -> None:
        """Stop; what is queued is dropped. Safe to repeat."""
        self._thread.close()

    # ---- the thread --------------------------------------------------------------------------------------------------

    @property
    def _all(self) -> list[Member]:
        return [member for _, member in sorted(self._members.items())]

    def _ask_one(self, message: Any, end: float) -> Any:
        """The answer of any replica, one that serves if there is one."""
        for member in sorted(self._all, key=lambda m: not m.serving):
            try:
                return member.channel.call(message, left(end))
            except GONE:
                continue
        raise EngineDiedError("no replica of the pool is alive at present; try again later")

    # ---- messages ----------------------------------------------------------------------------------------------------

    def _hello(self, message: msg.Hello, end: float) -> msg.EngineInfo:
        info: msg.EngineInfo = self._ask_one(message, end)
        nobody = None if self.serving else f"no replica holds version {self.served.version}"
        return msgspec.structs.replace(
            info,
            engine_id=self._engine_id,
            process=current_process(),
            version=self.served.version,
            label=self.served.label,
            torn=self.lost or nobody,
            tp_size=sum(member.ranks for member in self._all),
        )

    def _close_arena(self, message: msg.CloseArena, end: float) -> msg.Ack:
        if self._source is not None and self._source.layout[0] == message.arena_id:
            self._source = None
        return self._arenas.close(message, self._all, end)

    def _fingerprint(self, message: msg.GetFingerprint, end: float) -> msg.FingerprintReply:
        members = [member for member in self._all if member.serving] or self._all
        answers = ask_all(same(members, message), end)
        answers.raise_refusal()
        found = {member.number: reply.fingerprint for member, reply in answers.replies.items()}
        if len(set(found.values())) > 1:
            shown = ", ".join(f"replica {n}: {value:#018x}" for n, value in sorted(found.items()))
            raise WeightUpdateError(
                f"the replicas hold different weights: got {shown}, expected one value; publish a complete update"
            )
        reply: msg.FingerprintReply = next(iter(answers.replies.values()))
        return msgspec.structs.replace(
            reply, version=self.served.version, label=self.served.label, torn=self.lost
        )

    def _begin(self, message: msg.Begin, end: float) -> msg.BeginReply:
        for member in list(self._unsure):
            with contextlib.suppress(*GONE):
                self._adopt(member, member.channel.call(msg.Hello(), left(end)), end)
        version = self._next_version(message)
        try:
            return self._open(message, version, end)
        except StaleVersionError:
            if message.version is not None:
                raise
        # A replica holds a later version than the pool has heard of; the next one is above that.
        infos = ask_all(same(self._all, msg.Hello()), end).replies.values()
        highest = max((info.version for info in infos), default=self.served.version)
        return self._open(message, highest + 1, end)

    def _open(self, message: msg.Begin, version: int, end: float) -> msg.BeginReply:
        serving = [member for member in self._all if member.serving]
        # Parts of an update would make a mixture of what a replica that is behind holds.
        members = self._all if message.strict or not serving else serving
        digest = message.manifest_digest
        if message.manifest is not None:
            self._manifests[digest] = message.manifest
            while len(self._manifests) > _KEPT:
                self._manifests.popitem(last=False)
        manifest = self._manifests.get(digest)
        update = FleetUpdate.begin(
            message,
            epoch=next(self._epochs),
            version=version,
            strict=message.strict or (not serving and self.lost is None),
            members=self._arenas.opened_by(message.arena_id, members, end),
            manifest=manifest,
            num_rows=self._num_tensors if manifest is None else len(manifest.names),
            end=end,
        )
        if update is None:
            return msg.BeginReply(epoch=0, version=version, need_manifest=True)
        self._update = update
        return msg.BeginReply(epoch=update.epoch, version=version, need_manifest=False)

    def _next_version(self, request: msg.Begin) -> int:
        served = self.served.version
        version = served + 1 if request.version is None else request.version
        if version <= served:
            raise StaleVersionError(
                f"versions only grow: got {version}, expected more than {served}, which is served; leave version out "
                "to get the next one"
            )
        if request.base_version not in (None, served):
            raise StaleVersionError(
                f"the update is for another base: got base_version {request.base_version}, expected {served}, which "
                "is served; ask engine_info() and decide again"
            )
        return version

    def _in_session(
        self, message: Any, end: float, ask: Callable[[FleetUpdate, Any, float], Any]
    ) -> Any:
        """What `ask` returns; a failure ends the session on every replica."""
        update = self._update
        ending = self._endings.get(message.session_id)
        if ending is not None:
            raise ending[0](*ending[1])
        if update is None:
            raise SessionError(f"no such session: got {message.session_id!r}; begin one first")
        update.check(message)
        try:
            return ask(update, message, end)
        except Exception as error:
            self._aborted = message.session_id, update.abort(f"a replica refused: {error}")
            self._end(update, error)
            raise

    def _abort(self, message: msg.Abort, end: float) -> msg.Ack:
        """The answer means that no replica reads the arena any more; `DeadlineExceeded` where that is not known."""
        update = self._update
        if update is not None and update.request.session_id == message.session_id:
            self._aborted = message.session_id, update.abort(message.reason)
            self._end(update, SessionError(f"the session was aborted: {message.reason}"))
        session_id, asked = self._aborted
        if session_id == message.session_id:
            for error in collect(asked, end).errors.values():
                raise error
        return msg.Ack()

    def _commit(self, message: msg.Commit, end: float) -> msg.CommitReply:
        update = self._update
        outcome: Outcome = self._in_session(message, end, FleetUpdate.commit)
        assert update is not None
        self._end(update, SessionError("the session has ended: it was committed; begin a new one"))
        reply = self._committed(update, outcome)
        self._on_change()
        return reply

    def _end(self, update: FleetUpdate, why: Exception) -> None:
        self._update = None
        # Without the traceback, which would keep what it saw alive.
        self._endings[update.request.session_id] = type(why), why.args
        while len(self._endings) > _KEPT:
            self._endings.popitem(last=False)

    # ---- who serves what ---------------------------------------------------------------------------------------------

    def _committed(self, update: FleetUpdate, outcome: Outcome) -> msg.CommitReply:
        """Note the new version; whoever does not hold it is behind."""
        if not outcome.committed:
            for member, error in outcome.failed.items():
                if isinstance(error, DeadlineExceeded):
                    self._doubt = update
                    self._unsure.add(member)
                if isinstance(error, (TornWeightsError, DeadlineExceeded)):
                    self._fall_behind(member, error)
            self._on_change()
            raise first_error(outcome)
        self._doubt = None
        self._unsure.clear()
        leader = next((m for m in outcome.committed if m.serving), next(iter(outcome.committed)))
        reply = outcome.reply
        fingerprint = outcome.committed[leader].fingerprint
        self.served = Served(version=update.version, label=reply.label, fingerprint=fingerprint)
        self._source = Source.after(
            update, self._source, self._arenas.handle(update.request.arena_id)
        )
        for member in self._all:
            found = outcome.committed.get(member)
            if found is not None and found.fingerprint == fingerprint:
                self._serves(member)
            else:
                why = outcome.failed.get(member) or WeightUpdateError("it took no part in it")
                self._fall_behind(member, why)
        if self.lost is not None:
            info = self._ask_one(msg.Hello(), time.monotonic() + self._timeout_s)
            self.lost = info.torn and self.lost
        return msgspec.structs.replace(reply, fingerprint=fingerprint)

    def _serves(self, member: Member) -> None:
        member.whole = True
        self.behind.pop(member.number, None)

    def _fall_behind(self, member: Member, error: Exception) -> None:
        logger.warning(
            "replica %d does not hold version %d: %s", member.number, self.served.version, error
        )
        member.whole = False
        self.behind[member.number] = error

    def _adopt(self, member: Member, info: msg.EngineInfo, end: float) -> None:
        """Settle whether a replica has committed the update in doubt; if so, that is what the pool serves."""
        self._unsure.discard(member)
        doubt = self._doubt
        if doubt is None or info.torn is not None or info.version != doubt.version:
            return
        reply: msg.FingerprintReply = member.channel.call(msg.GetFingerprint(), left(end))
        logger.warning("replica %d has committed version %d late", member.number, info.version)
        label = info.label if info.label is not None else str(info.version)
        self.served = Served(version=info.version, label=label, fingerprint=reply.fingerprint)
        self._doubt, self._source = None, None
        for other in self._all:
            why = WeightUpdateError(f"replica {member.number} has committed version {info.version}")
            self._fall_behind(other, why)
        self._serves(member)
        self._on_change()

    def _bring_up(self, member: Member) -> None:
        """Make a replica hold the served version, or note why it does not."""
        end = time.monotonic() + self._timeout_s
        try:
            info: msg.EngineInfo = member.channel.call(msg.Hello(), left(end))
            member.ranks = info.tp_size
            self._num_tensors = len(info.manifest.names)
            self._adopt(member, info, end)
            if self.lost is not None and self.lost != self._awaits:
                raise TornWeightsError(f"the pool has no whole weights to give: {self.lost}")
            peers = [other for other in self._all if other.serving and other is not member]
            fingerprint = catch_up(
                member, info, self.served, self._source, peers, self._group_host, end
            )
        except Exception as error:
            self._fall_behind(member, error)
            raise
        else:
            self.served = msgspec.structs.replace(self.served, fingerprint=fingerprint)
            self._serves(member)
        finally:
            self._on_change()
