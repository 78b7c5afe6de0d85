"""One weight update for many engines: what a trainer tells the pool, every replica is told, and all must agree.

The trainer packs its arena once; all replicas map it. A refusal by one replica before the commit ends the session on
all of them. A replica that dies is left out. What a replica holds is what it has said last; one that has not said so
is asked, and gets requests only when it holds what the pool serves.

A `WeightPublisher` sees one engine: the pool has its own arena ids and epochs, and an identity that stays when replicas
come and go.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, ClassVar

import msgspec

from weight_sync.errors import (
    DeadlineExceeded,
    EngineDiedError,
    StaleVersionError,
    TornWeightsError,
    WeightUpdateError,
)
from weight_sync.joint.members import Member, same
from weight_sync.joint.service import JointService
from weight_sync.joint.session import CommitOutcome, JointSession, next_version
from weight_sync.time_left import left_s
from weight_sync.wire import messages as msg
from weight_sync.wire.process import current_process

from ..errors import EngineClosedError
from .catch_up import KnownArena, ServedVersion, WatchedSession, catch_up

logger = logging.getLogger(__name__)

GONE = (EngineDiedError, EngineClosedError)


@dataclass(slots=True, eq=False, kw_only=True)
class ReplicaMember(Member):
    """One replica, as a trainer's messages reach it."""

    gone: ClassVar[tuple[type[Exception], ...]] = GONE

    number: int
    """Its number in the pool."""
    ask: Callable[..., Future[Any]]
    """`ask(command, timeout_s=...)`: its other commands."""
    holds: int | None = None
    """The version that it said it holds, whole and with the pool's bytes; None: it has to be asked, or does not."""
    why: Exception | None = None
    """Why it does not hold the served version; None: it does, or is new."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What the replicas have said, all as of one moment."""

    served: ServedVersion
    """What all of them should hold."""
    serving: frozenset[int]
    """Those that hold it, whole, and live as far as one knows."""
    behind: dict[int, Exception]
    """Those that do not, and why."""
    lost: str | None
    """See `FleetWeights.lost`."""


class FleetWeights(JointService):
    """Serves trainers on behalf of all replicas, and brings those up that do not hold what the others serve."""

    spare = True
    what = "pool"

    def __init__(
        self,
        *,
        label: str,
        timeout_s: float,
        group_host: str = "127.0.0.1",
        awaits: str | None = None,
    ) -> None:
        """label: of what the replicas load. timeout_s: for bringing up one replica. group_host: where replicas on other
        machines reach this one. awaits: why what the replicas load is not to be used; None: it is.
        """
        self.served = ServedVersion(version=0, label=label, fingerprint=None)
        self.lost: str | None = awaits
        """Why no replica has whole weights (their memory was released, none have come yet); None: they have."""
        self._awaits = awaits
        self._engine_id = secrets.token_hex(8)
        self._timeout_s = timeout_s
        self._on_change: Callable[[], None] = lambda: None
        self._lock = threading.RLock()  # Around what `known` tells at once.
        self._group_host = group_host
        self._num_tensors = 0
        self._source: KnownArena | None = None
        self._doubt: int | None = None
        """The version of the last update, while some may have committed it and none has said so."""
        self._members: list[ReplicaMember]
        super().__init__([], name="pool")

    # ---- any thread --------------------------------------------------------------------------------------------------

    def watch(self, on_change: Callable[[], None]) -> None:
        """From now on `on_change()` is told, on the thread, whenever what is `known` may have changed."""
        self._on_change = on_change

    def known(self) -> Known:
        """What one may rely on until something happens."""
        with self._lock:
            return Known(
                served=self.served,
                serving=frozenset(m.number for m in self._members if self._serves(m)),
                behind={m.number: why for m in self._members if (why := _why_not(m)) is not None},
                lost=self.lost,
            )

    @property
    def serving(self) -> frozenset[int]:
        """See `Known`."""
        return self.known().serving

    @property
    def behind(self) -> dict[int, Exception]:
        """See `Known`."""
        return self.known().behind

    @property
    def torn(self) -> str | None:
        """Why nothing can be generated; None: some replica holds the served version."""
        nobody = f"no replica holds version {self.served.version}"
        return self.lost or (None if self.serving else nobody)

    def version_now(self) -> tuple[str, int]:
        """Label and number of what is served."""
        return self.served.label, self.served.version

    def add(self, member: ReplicaMember) -> Future[None]:
        """Take a replica in and bring it to the served version. With an error it is there, but behind."""

        def bring_up() -> None:
            self._members = [*self._members, member]
            self._bring_up(member)

        return self.do(bring_up)

    def bring_up(self, number: int) -> Future[None]:
        """Once more for a replica that fell behind, or whose answer denies what it has said: that counts no more."""
        for member in self._numbered(number):
            member.holds = None

        def bring_up() -> None:
            for member in self._numbered(number):
                self._bring_up(member)

        return self.do(bring_up)

    def remove(self, number: int) -> Future[None]:
        """Forget a replica."""

        def forget() -> None:
            for member in self._numbered(number):
                self._members = [other for other in self._members if other is not member]
                if self._session is not None:
                    self._session.epochs.pop(member, None)

        return self.do(forget)

    def look(self) -> Future[None]:
        """Ask all what they hold: their memory may have been released. `lost` says so, until a complete update."""

        def look() -> None:
            infos = self._ask(same(self._members, msg.Hello()), time.monotonic() + self._timeout_s)
            torn = {m: info.torn for m, info in infos.replies.items() if info.torn is not None}
            everybody = len(torn) == len(infos.replies)
            self.lost = next(iter(torn.values()), None) if everybody else None
            if torn:
                self._source = None
            for member, reason in torn.items() if not everybody else ():
                # Others took an update after they had released, this one before.
                self._fall_behind(member, TornWeightsError(reason))
            self._on_change()

        return self.do(look)

    def _numbered(self, number: int) -> list[ReplicaMember]:
        return [member for member in self._members if member.number == number]

    # ---- messages, on the thread -------------------------------------------------------------------------------------

    def _serves(self, member: ReplicaMember) -> bool:
        return member.holds == self.served.version and member.channel.dead is None

    def _ask_one(self, message: Any, end: float) -> Any:
        """The answer of any replica, one that serves if there is one."""
        for member in sorted(self._members, key=lambda m: not self._serves(m)):
            with contextlib.suppress(*GONE):
                return member.channel.call(message, left_s(end))
        raise EngineDiedError("no replica of the pool is alive at present; try again later")

    def _hello(self, message: msg.Hello, end: float) -> msg.EngineInfo:
        info: msg.EngineInfo = self._ask_one(message, end)
        return msgspec.structs.replace(
            info,
            engine_id=self._engine_id,
            process=current_process(),
            version=self.served.version,
            label=self.served.label,
            torn=self.torn,
            tp_size=sum(member.ranks for member in self._members),
        )

    def _close_arena(self, message: msg.CloseArena, end: float) -> msg.Ack:
        if self._source is not None and self._source.layout[0] == message.arena_id:
            self._source = None
        return super()._close_arena(message, end)

    def _set_label(self, message: msg.SetLabel, end: float) -> msg.Ack:
        answer = super()._set_label(message, end)
        self.served = msgspec.structs.replace(self.served, label=message.label)
        return answer

    def _fingerprint(self, message: msg.GetFingerprint, end: float) -> msg.FingerprintReply:
        serving = [member for member in self._members if self._serves(member)]
        reply = self._one_fingerprint(serving or self._members, message, end)
        served = self.served
        return msgspec.structs.replace(
            reply, version=served.version, label=served.label, torn=self.lost
        )

    def _begin(self, message: msg.Begin, end: float) -> msg.BeginReply:
        self._ask_those_in_doubt(end)
        version = next_version(message, self.served.version)
        try:
            return self._begin_version(message, version, end)
        except StaleVersionError:
            if message.version is not None:
                raise
        # A replica holds a later version than the pool has heard of; the next one is above that.
        infos = self._ask(same(self._members, msg.Hello()), end).replies.values()
        highest = max((info.version for info in infos), default=version)
        return self._begin_version(message, highest + 1, end)

    def _begin_version(self, message: msg.Begin, version: int, end: float) -> msg.BeginReply:
        serving = [member for member in self._members if self._serves(member)]
        each = msgspec.structs.replace(
            message,
            version=version,
            base_version=None,
            strict=message.strict or (not serving and self.lost is None),
        )
        # Parts of an update would make a mixture of what a replica that is behind holds.
        members = self._members if message.strict or not serving else serving
        return self._open(message, each, members, end)

    def _make_session(self, messages: dict[Any, msg.Begin], **fields: Any) -> JointSession | None:
        return WatchedSession.begin(self, messages, num_tensors=self._num_tensors, **fields)

    def _committed(self, session: JointSession, outcome: CommitOutcome) -> msg.CommitReply:
        """Note the new version; whoever does not hold it is behind."""
        try:
            reply = outcome.reply
        except Exception:
            for member, error in outcome.failed.items():
                if isinstance(error, DeadlineExceeded):
                    self._doubt = session.version
                if isinstance(error, (TornWeightsError, DeadlineExceeded)):
                    self._fall_behind(member, error)
            self._on_change()
            raise
        self._doubt = None
        leader = next(
            (m for m in outcome.committed if self._serves(m)), next(iter(outcome.committed))
        )
        fingerprint = outcome.committed[leader].fingerprint
        assert isinstance(session, WatchedSession)
        self._source = KnownArena.after(
            session, self._source, self._arenas.handle(session.request.arena_id)
        )
        served = ServedVersion(version=session.version, label=reply.label, fingerprint=fingerprint)
        with self._lock:
            self.served = served
            for member in self._members:
                found = outcome.committed.get(member)
                if found is not None and found.fingerprint == fingerprint:
                    self._hold(member)
                else:
                    why = outcome.failed.get(member) or WeightUpdateError("it took no part in it")
                    self._fall_behind(member, why)
        if self.lost is not None:
            info = self._ask_one(msg.Hello(), time.monotonic() + self._timeout_s)
            self.lost = info.torn and self.lost
        self._on_change()
        return msgspec.structs.replace(reply, fingerprint=fingerprint)

    # ---- who holds what ----------------------------------------------------------------------------------------------

    def _hold(self, member: ReplicaMember) -> None:
        with self._lock:
            member.holds, member.why = self.served.version, None

    def _fall_behind(self, member: ReplicaMember, error: Exception) -> None:
        logger.warning("%s does not hold version %d: %s", member.name, self.served.version, error)
        with self._lock:
            member.holds, member.why = None, error

    def _ask_those_in_doubt(self, end: float) -> None:
        """Ask those that may have committed the last update; `DeadlineExceeded` when they do not say in time."""
        for member in self._members if self._doubt is not None else ():
            with contextlib.suppress(*GONE):
                self._adopt(member, member.channel.call(msg.Hello(), left_s(end)), end)
        self._doubt = None

    def _adopt(self, member: ReplicaMember, info: msg.EngineInfo, end: float) -> None:
        """What one replica has committed in the update that is in doubt is what the pool serves."""
        if info.torn is not None or info.version != self._doubt:
            return
        reply: msg.FingerprintReply = member.channel.call(msg.GetFingerprint(), left_s(end))
        logger.warning("%s has committed version %d late", member.name, info.version)
        label = info.label if info.label is not None else str(info.version)
        served = ServedVersion(version=info.version, label=label, fingerprint=reply.fingerprint)
        self._doubt, self._source = None, None
        why = WeightUpdateError(f"{member.name} has committed version {info.version}")
        with self._lock:
            self.served = served
            for other in self._members:
                self._fall_behind(other, why)
            self._hold(member)
        self._on_change()

    def _bring_up(self, member: ReplicaMember) -> None:
        """Make a replica hold the served version, or note why it does not."""
        end = time.monotonic() + self._timeout_s
        try:
            info: msg.EngineInfo = member.channel.call(msg.Hello(), left_s(end))
            member.ranks = info.tp_size
            self._num_tensors = len(info.manifest.names)
            self._adopt(member, info, end)
            if self.lost is not None and self.lost != self._awaits:
                raise TornWeightsError(f"the pool has no whole weights to give: {self.lost}")
            peers = [m for m in self._members if self._serves(m) and m is not member]
            fingerprint = catch_up(
                member, info, self.served, self._source, peers, self._group_host, end
            )
            if info.version == self.served.version and info.label != self.served.label:
                # It has had these weights since its start, and does not know what they are called now.
                member.channel.call(
                    msg.SetLabel(
                        label=self.served.label, nonce=secrets.token_hex(8), timeout_s=left_s(end)
                    ),
                    left_s(end),
                )
        except Exception as error:
            self._fall_behind(member, error)
            raise
        else:
            with self._lock:
                self.served = msgspec.structs.replace(self.served, fingerprint=fingerprint)
                self._hold(member)
        finally:
            self._on_change()


def _why_not(member: ReplicaMember) -> Exception | None:
    dead = member.channel.dead
    return member.why or (EngineDiedError(dead) if dead is not None else None)
