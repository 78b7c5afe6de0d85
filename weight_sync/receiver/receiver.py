"""The engine's half of an update: one `WeightReceiver` per rank.

    IDLE --begin--> STAGING --stage*--> STAGING --prepare--> VOTED --commit--> IDLE, at the new version
    any of these, up to the first written byte --abort, lease, dead trainer, failed check--> IDLE, nothing changed
    commit fails after the first byte --> IDLE at the previous version (a copy was kept)
                                          or TORN until a complete update has committed

One session at a time; every message names its session and epoch, and messages of an ended session get the reason of
its end. All methods run on one thread, the service's; only the write happens on the engine loop's.
"""

import dataclasses
import logging
import math
import secrets
import time
from collections.abc import Iterable

import msgspec
import numpy as np
import torch

from ..errors import (
    SessionError,
    SyncError,
    TornWeightsError,
    WeightUpdateError,
)
from ..joint.session import next_version
from ..layout.encoding import FULL, Encoding
from ..layout.manifest import Manifest
from ..layout.weight_map import WeightMap
from ..plan.plan_cache import PlanCache
from ..staging.joined_group import JoinedGroup
from ..staging.opened_arena import OpenedArena
from ..staging.stage_memories import StageMemories
from ..time_left import left_s
from ..wire.messages import (
    PROTOCOL_VERSION,
    Begin,
    BeginReply,
    Bucket,
    BucketReply,
    Commit,
    CommitReply,
    EngineInfo,
    FingerprintReply,
    IgnoredReply,
    Receive,
    SetLabel,
)
from ..wire.process import current_process, why_dead
from .agreement import RankAgreement, SoloAgreement, check_in_time
from .arena_table import ArenaTable
from .commit import Served, Snapshot, WeightCommit, boundary_names, tear_for, unwritable
from .endings import Endings
from .host import WeightHost
from .received import check_can_receive, left_on_error, receive, stage_received
from .repair import Repair
from .resident import ResidentFingerprints
from .session import Phase, Session, check_wishes

logger = logging.getLogger(__name__)


class WeightReceiver:
    """Holds the served version and the one session. See the module for its states.

    `keep_previous` pays for a copy of the model so that a commit that fails half-way rolls back. `version` and `label`
    are those of the weights that are resident now. `torn`: why these are not to be used before a complete update.
    `encodings`: those that an update may have.
    """

    def __init__(
        self,
        weight_map: WeightMap,
        host: WeightHost,
        *,
        bucket_bytes: int = 512 << 20,
        keep_previous: bool = False,
        version: int = 0,
        label: str | None = None,
        torn: str | None = None,
        agreement: RankAgreement | None = None,
        encodings: Iterable[Encoding] = (FULL,),
    ) -> None:
        self.engine_id = secrets.token_hex(8)
        self._weight_map = weight_map
        self._host = host
        self._agreement = agreement or SoloAgreement()
        self.num_ranks = self._agreement.size
        self._canonical = Manifest(tensors=weight_map.metas(), bucket_bytes=bucket_bytes)
        self._wire = self._canonical.to_wire()
        self._plans = PlanCache(self._canonical, weight_map, encodings)
        names = [meta.name for meta in self._canonical.tensors]
        self._resident = ResidentFingerprints(names, self._plans, host, self._agreement)
        self._snapshot = Snapshot(weight_map.parameters) if keep_previous else None
        self._served = Served(version=version, label=str(version) if label is None else label)
        self._repair: Repair | None = None  # while the weights are torn
        self._arenas = ArenaTable()
        self.stages = StageMemories(
            weight_map,
            self.device,
            host,
            lambda: tear_for(self._session, host, self.lose_weights, self.stage_end),
        )
        self.stage_memory = self.stages.extra
        self._epoch = 0
        self._session: Session | None = None
        self.stage_end = math.inf
        """When (monotonic) nobody waits any more for the bucket at hand: without a stage nothing is written later."""
        self._endings = Endings()
        self.recent: tuple[tuple[float, CommitReply], ...] = ()
        """The last commits and when (`time.perf_counter()`), the newest first. Any thread may look."""
        if torn is not None:
            self._repair = Repair(torn, len(names), from_nothing=True)
            self._served = Served(version=version, label=self.label, torn=torn)

    @property
    def version(self) -> int:
        """Version that is served; any thread may ask."""
        return self._served.version

    @property
    def label(self) -> str:
        """Its label."""
        return self._served.label

    @property
    def torn(self) -> str | None:
        """Why the resident weights are a mixture, or None."""
        return self._served.torn

    @property
    def rank(self) -> int:
        """This rank of the engine."""
        return self._agreement.rank

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(iter(self._weight_map.parameters.values()), torch.empty(0)).device

    @property
    def updating(self) -> bool:
        """A session is open: its thread may read or write the parameters at any moment. Any thread may ask."""
        return self._session is not None

    @property
    def busy(self) -> bool:
        """A session or an arena is open, whose owner must be watched."""
        return self._session is not None or len(self._arenas) > 0

    def info(self) -> EngineInfo:
        """What `Hello` is answered with; any thread may ask."""
        served = self._served
        return EngineInfo(
            protocol=PROTOCOL_VERSION,
            process=current_process(),
            engine_id=self.engine_id,
            version=served.version,
            label=served.label,
            torn=served.torn,
            manifest=self._wire,
            aliases=dict(self._weight_map.aliases),
            fused=dict(self._weight_map.fused),
            device=str(self.device),
            tp_size=self._agreement.size,
            transports=(
                *("local", "shared_memory", "process_group"),
                *(("cuda_ipc",) if self.device.type == "cuda" else ()),
            ),
        )

    def ignored(self, names: tuple[str, ...]) -> IgnoredReply:
        """Those of `names` that a trainer may send although the model has no memory for them."""
        return IgnoredReply(names=tuple(n for n in names if self._weight_map.is_ignored(n)))

    def fingerprint(self) -> FingerprintReply:
        """Read the resident bytes, all of them, now; `WeightUpdateError` while their memory is released."""
        values = self._resident.read()
        served = self._served
        return FingerprintReply(
            version=served.version,
            label=served.label,
            torn=served.torn,
            fingerprint=self._resident.combined(values),
            tensors=values.astype("<u8").tobytes(),
        )

    def add_arena(self, arena: OpenedArena) -> int:
        """Keep an opened arena; returns its id."""
        self.sweep()
        return self._arenas.add(arena)

    def close_arena(self, arena_id: int) -> None:
        """Drop an arena; an open session over it ends."""
        if self._session is not None and self._session.request.arena_id == arena_id:
            self._end(SessionError("the session's arena was closed; begin again"))
        self._arenas.close(arena_id)

    def begin(self, request: Begin) -> BeginReply:
        """Open the session, or say why not; nothing is held afterwards in that case."""
        self.sweep(asked=True)
        if self._session is not None:
            raise self._session.busy()
        version = next_version(request, self.version)
        arena = self._arenas.get(request.arena_id)
        check_wishes(request, unstaged=arena.unstaged)
        with self._host.reading():
            gone = self._host.unwritable()
            if gone is not None and not self._plans.knows(
                request.manifest_digest, request.encoding
            ):
                raise WeightUpdateError(f"the parameters cannot be planned for: {gone}")
            known = self._plans.find(request.manifest_digest, request.manifest, request.encoding)
        if known is None:
            return BeginReply(epoch=0, version=version, need_manifest=True)
        stage = arena.stage(known.plan)
        self._epoch += 1
        self._session = Session(
            request=request,
            epoch=self._epoch,
            version=version,
            label=str(version) if request.label is None else request.label,
            known=known,
            stage=stage,
        )
        return BeginReply(epoch=self._epoch, version=version, need_manifest=False)

    def stage(self, bucket: Bucket) -> BucketReply:
        """Check that a bucket's bytes are what the trainer declared; a failure ends the session, and its group."""
        start = time.perf_counter()
        try:
            session = self._require(bucket.session_id, bucket.epoch)
        except Exception:  # whatever ended it
            self._refuse(bucket.session_id)
            raise
        try:
            if session.phase is not Phase.STAGING:
                raise SessionError(
                    "a bucket after the vote: expected Commit or Abort; send everything before the commit"
                )
            with session.awaiting_bytes(), self._host.named("stage"):
                session.stage_bucket(bucket)
        except Exception as error:
            try:
                self._fail(session, error)
            finally:
                self._refuse(bucket.session_id)
            raise
        session.renew()  # the next bucket may have waited for this one to be checked
        return BucketReply(
            num_staged=int(session.present.sum()), stage_s=time.perf_counter() - start
        )

    def receive(self, message: Receive, group: JoinedGroup) -> BucketReply:
        """Receive what a plain trainer broadcasts, and stage it; a failure ends the session.

        Whoever does not take the bytes leaves the group, lest the next call take them for its own. All ranks
        receive the same. The trainer need not have sent a fingerprint, so the reply has one of what came, for whoever
        asks several ranks to compare.
        """
        start = time.perf_counter()
        with left_on_error(group):
            session = self._require(message.session_id, message.epoch)
        try:
            with left_on_error(group), session.awaiting_bytes(), self._host.named("receive"):
                check_can_receive(session, self._canonical)
                session.take_from_groups(self.stage_memory, group)
                timeout_s = min(message.timeout_s, session.request.lease_s)
                tensors = receive(group, message, timeout_s, session)
            before = session.present.copy()
            with self._host.named("stage"):
                values = stage_received(session, self.info(), tensors)
            received = self._resident.combined(values, session.present & ~before)
        except Exception as error:
            self._fail(session, error)
            raise
        session.renew()
        return BucketReply(
            num_staged=int(session.present.sum()),
            stage_s=time.perf_counter() - start,
            received=received,
        )

    def miss(self, message: Bucket | Receive, group: JoinedGroup | None, reason: Exception) -> None:
        """`message` came too late to be carried out, so what it announced is never taken; its session ends."""
        session = self._session
        if session is not None and (session.request.session_id, session.epoch) == (
            message.session_id,
            message.epoch,
        ):
            self._end(reason)
        self._refuse(message.session_id)
        if group is not None:
            group.destroy(wait_s=0.0)

    def prepare(self, session_id: str, epoch: int) -> Session:
        """The vote: this rank can commit, or the session ends here. Changes nothing that serves."""
        session = self._require(session_id, epoch)
        if session.phase is Phase.VOTED:
            return session
        error: SyncError | None = None
        if session.request.strict:
            error = self._plans.not_covered(session.known, session.present)
        error = unwritable(self._host) or error
        if error is not None:
            self._end(error)
            raise error
        if self._snapshot is not None and self.torn is None:
            self._snapshot.take()
        session.phase = Phase.VOTED
        return session

    def commit(self, request: Commit, deadline: float = math.inf) -> CommitReply:
        """Vote and write. Whatever the outcome, the session is over afterwards.

        Nothing is written after `deadline` (monotonic), nor later than `request.timeout_s` from now.
        """
        end = min(deadline, time.monotonic() + request.timeout_s)
        session = self.prepare(request.session_id, request.epoch)
        repair = self._repair
        if repair is not None:
            covered = session.known.covered(session.present)
            repair = repair.after(covered, session.request.label)
        write = WeightCommit(
            session=session,
            host=self._host,
            served=self._served,
            torn_after=None if repair is None else str(repair),
            agreement=self._agreement,
            snapshot=self._snapshot,
            on_served=self._set_served,
            check_restored=self._resident.check_restored,
            end=end,
        )
        try:
            write.run()
        except BaseException as error:
            if isinstance(error, TornWeightsError):
                self._lost(str(error))
            if isinstance(error, SyncError):
                self._end(error)
                raise
            failure = WeightUpdateError(
                f"the commit of version {session.version} failed with {type(error).__name__}: {error}; version "
                f"{self.version} serves; look at the engine's log"
            )
            self._end(failure)
            try:
                raise failure from error
            finally:
                del failure  # it holds this frame, and so the arena
        self._repair = repair
        try:
            return self._reply(session, write)  # It may read parameters: the session is still open.
        finally:
            self._end(SessionError("the session has ended: it was committed; begin a new one"))

    def give_up_write(self, session_id: str) -> None:
        """Should this session wait for a step boundary now, to be written, it ends unwritten. Any thread, of rank 0."""
        for name in boundary_names(session_id) if self.rank == 0 else ():
            self._host.forgo(name)

    def set_label(self, message: SetLabel, deadline: float = math.inf) -> None:
        """Another label for what serves; on this thread, so that no commit restores the old one behind its back.

        Not after `deadline` (monotonic), nor later than `message.timeout_s` from now.
        """
        end = min(deadline, time.monotonic() + message.timeout_s)

        def write() -> None:
            check_in_time(self._agreement, end, f"the label {message.label!r}")
            self._set_served(dataclasses.replace(self._served, label=message.label))
            self._host.label_changed(message.label)

        self._host.between_steps(write, left_s(end), f"label/{message.nonce}")

    def lose_weights(self, reason: str) -> None:
        """The resident bytes are gone (their memory was given back): torn, until updates have covered everything.

        Called on the engine loop's thread, between two steps.
        """
        self._lost(reason)
        served = self._served
        self._set_served(Served(version=served.version, label=served.label, torn=str(self._repair)))
        self._host.weights_torn(reason, served.version, served.label)

    def _lost(self, reason: str) -> None:
        self._resident.forget()
        self._repair = Repair(reason.partition("\n")[0], len(self._canonical.tensors))

    def abort(self, session_id: str, epoch: int, reason: str) -> None:
        """Forget the session if it is the open one; it may have ended already. epoch 0: whatever it is."""
        session = self._session
        if session is None or session.request.session_id != session_id:
            return
        if epoch in (0, session.epoch):
            self._end(SessionError(f"the session was aborted: {reason}; begin a new one"))

    def sweep(self, *, asked: bool = False) -> None:
        """End the session when its lease is over or its trainer dead; close arenas of dead trainers.

        Whoever asked for a vote may be committing it elsewhere, so it is kept: by one rank of several until rank 0 says
        that it is over, or asks for another session (`asked`); by a whole engine (one of a pool) for its lease.
        """
        session = self._session
        bound = (
            session is not None
            and session.phase is Phase.VOTED
            and (self._agreement.size > 1 or session.lease_left_s > 0)
        )
        if session is not None and (asked or not bound):
            bound = False
            why = why_dead(session.request.holder)
            if why is not None:
                self._end(SessionError(f"the session has ended: its trainer is dead ({why})"))
            elif session.lease_left_s <= 0 and not session.awaits:
                self._end(
                    SessionError(
                        f"the session has ended: nothing came for its lease of {session.request.lease_s} s; "
                        "begin a new one, with a longer lease_s if the trainer needs it"
                    )
                )
        for arena_id in self._arenas.orphans():
            if not (bound and session is not None and session.request.arena_id == arena_id):
                self.close_arena(arena_id)

    def close(self) -> None:
        """End the session and give back every arena."""
        self._end(SessionError("the session has ended: the engine was shut down"))
        for arena_id in self._arenas.ids():
            self.close_arena(arena_id)

    def _require(self, session_id: str, epoch: int) -> Session:
        session = self._session
        if session is not None and session.lease_left_s <= 0:
            self.sweep()
            session = self._session
        if session is not None and session.request.session_id == session_id:
            if epoch in (0, session.epoch):
                session.renew()
                return session
            raise SessionError(
                f"a message of another epoch: got {epoch}, expected {session.epoch}; "
                "use the epoch that BeginReply gave"
            )
        self._endings.reraise(session_id)
        raise SessionError(
            f"no such session: got {session_id!r}, expected "
            f"{session.request.session_id if session else 'Begin first'!r}; begin a new one"
        )

    def _refuse(self, session_id: str) -> None:
        """A bucket of a session that is over is not taken; its bytes may be under way all the same."""
        arena_id = self._endings.arena_of(session_id)
        if arena_id is not None:
            self._arenas.refuse(arena_id)

    def _fail(self, session: Session, error: Exception) -> None:
        """End `session` because of `error`; raises why it has ended, if that was before, while its bytes came."""
        if self._session is session:
            self._end(error)
        else:
            self._endings.reraise(session.request.session_id)

    def _end(self, reason: Exception) -> None:
        session = self._session
        if session is None:
            return
        logger.debug("session %s ends: %s", session.request.session_id, reason)
        session.end()
        self._session = None
        self._endings.note(session.request, reason)

    def _set_served(self, served: Served) -> None:
        self._served = served

    def _reply(self, session: Session, write: WeightCommit) -> CommitReply:
        covered = session.known.covered(session.present)
        resident = self._resident.after(session.known, session.decoded, session.present, covered)
        reply = CommitReply(
            version=session.version,
            label=session.label,
            num_updated=int(covered.sum()),
            left=np.flatnonzero(~covered).astype("<u4").tobytes(),
            fingerprint=self._resident.combined(resident),
            stage_s=session.stage_s,
            begin_to_committed_s=write.committed_at - session.began,
            begin_to_verified_s=write.verified_at - session.began,
            copy_s=write.copy_s,
            verify_s=write.verify_s,
            pause_s=write.pause_s,
        )
        self.recent = (
            (write.committed_at, msgspec.structs.replace(reply, left=b"")),
            *self.recent[:7],
        )
        return reply
