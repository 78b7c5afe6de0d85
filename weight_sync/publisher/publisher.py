"""The trainer's half of an update.

    with WeightPublisher(engine_or_address) as publisher:
        report = publisher.publish(model, label="step 17")

The arena has the engine's own layout, so what is left for the commit is a handful of large copies. It is made with the
first update, reused by every later one, and given back by `close()`.
"""

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, get_args

import numpy as np
import torch

from ..errors import ArenaGoneError, DeadlineExceeded, SessionError
from ..joint.engines import Target
from ..layout.named_tensors import NamedTensors
from ..report import SyncReport
from ..wire.cancellation import on_a_thread, threaded
from ..wire.deadline import Deadline
from ..wire.messages import (
    EngineInfo,
    FingerprintReply,
    GetFingerprint,
    KvPolicyName,
    Staging,
    VerifyMode,
)
from ..wire.process import Home
from ..wire.rpc_wire import check_timeout
from .endpoint import EngineEndpoint, GroupBackend, TransportChoice
from .open_session import UpdateOptions, check_choice
from .publish_session import PublishSession
from .selection import Selection
from .sources import AnyNamedTensors, blocking, is_listed, tensors_of
from .update import PackedRows, Update

T = TypeVar("T")

_ABORT_WAIT_S = 10.0
_INTERRUPT_WAIT_S = 0.5
"""How long Ctrl-C waits for the engine to confirm the end of a session."""

_MAY_HAVE_COMMITTED = "the engine may have committed: ask engine_info().version"


class WeightPublisher:
    """Pushes weights into one engine, given as an object of this process or as an address, or into a list of them.

    Several engines, of one model, are one target: tensors are packed once, all begin or none, and all have voted before
    one commits. A refusal or a death before that leaves all at their old version; an engine that answers late after
    that comes to the version by itself, and `DeadlineExceeded` says which one. They end at one version whatever they
    served before.

    Any thread may call; calls wait for each other. A call that fails leaves the publisher usable and the engine at its
    old version, except after `TornWeightsError`, which the next complete update repairs; so does one that is
    interrupted (Ctrl-C) or cancelled. When the engine was restarted at the same address, the next call connects to
    the new one. A publisher that is collected closes itself. A forked child is refused: it needs a publisher of its
    own.

    `timeout_s` limits every call as a whole. `bucket_bytes` is how much is packed before the engine may start checking
    it. `transport`: "auto" takes local memory for an engine of this process, the GPU's own ("cuda_ipc") where this
    process and the engine work on GPUs of one machine, else shared memory; "process_group" makes a group with all ranks
    of the engine, wherever they are, meeting at `group_host`, an address of this machine that
    they can reach. `group_backend`: "auto" is "nccl" for engines on CUDA, from the CUDA device that was current when
    the publisher was made, and "gloo" for others; gloo reaches any engine, from memory of the CPU.

    `arena_bytes`: over CUDA IPC, what may be taken of the trainer's GPU; None: as much as the model. Below that the
    arena is two buckets that are filled and read in turn, each at least as large as the largest tensor, and the engine
    keeps the bytes on its own GPU until the commit, its shard once more.

    `staging`: where bytes wait for the commit that do not stay in the arena (over a group, from memory of the host to a
    GPU, from another GPU, in two buckets). "extra": memory of the engine's for its weights once more, for as long as
    this publisher is connected; generation goes on. "kv_cache": as much, but of what the KV cache has given back
    (`release_memory_occupation`), and for the length of an update. "none": no memory, and no version meanwhile: what is
    checked is written at once, running requests end, and nothing is generated until the update is complete.
    """

    def __init__(
        self,
        engine_or_address: Target | Sequence[Target],
        *,
        timeout_s: float = 60.0,
        bucket_bytes: int = 512 << 20,
        transport: TransportChoice = "auto",
        group_host: str = "127.0.0.1",
        group_backend: GroupBackend = "auto",
        arena_bytes: int | None = None,
        staging: Staging = "extra",
    ) -> None:
        check_choice("transport", transport, get_args(TransportChoice))
        check_choice("group_backend", group_backend, get_args(GroupBackend))
        check_choice("staging", staging, get_args(Staging))
        self._timeout_s = check_timeout(timeout_s)
        self._home = Home("the publisher")
        self._lock = threading.RLock()
        self._endpoint = EngineEndpoint(
            engine_or_address,
            bucket_bytes=bucket_bytes,
            transport=transport,
            group_host=group_host,
            group_backend=group_backend,
            arena_bytes=arena_bytes,
            staging=staging,
        )
        self._bucket_bytes = bucket_bytes
        self._update: Update | None = None
        self._under_way: Update | None = None
        """Whose session may be open at the engine: set before it is opened, cleared when it has ended for certain."""
        self._finalizer = weakref.finalize(self, self._endpoint.let_go)

    def publish(
        self,
        named_tensors: NamedTensors,
        version: int | None = None,
        label: str | int | None = None,
        strict: bool = True,
        kv_policy: KvPolicyName | None = None,
        verify: VerifyMode = "pause",
        base_version: int | None = None,
        cast: bool = True,
        expected_fingerprints: Mapping[str, int] | None = None,
        check_finite: bool = True,
        timeout_s: float | None = None,
    ) -> SyncReport:
        """Make these tensors the engine's next version: all of them or, with an error, none.

        named_tensors: a module (its parameters), a mapping, pairs, or an iterator of pairs, which may reuse one
            tensor's memory for all of them. Hugging Face names, with or without what wrappers put into them
            (`DistributedDataParallel`, `torch.compile`, checkpointing); tied and fused names are understood. Adapters
            of a module (PEFT) are merged while their layer is packed, and taken out again, whatever happens.
        version: above the served one; None: the next. label: the caller's own name for it.
        strict: every parameter must be sent; False: those that are not keep their values and are listed in the report.
        kv_policy: what the engine does with KV of older versions; None: its own default.
        verify: "pause" compares the resident bytes before generation goes on; "overlapped" while it goes on, holding
            the new tokens back.
        base_version: refuse unless this version is served now. cast: allow another floating-point dtype than the
            engine's. expected_fingerprints: by name, checked against what was packed (checkpoints carry them).
        check_finite: refuse NaN and infinite values, `NonFiniteWeightsError`.
        timeout_s: limit of this call as a whole; None: the publisher's. The engine keeps the session as long.

        Returns when the bytes were verified; the trainer's tensors may change from then on, and an iterator's as soon
        as it is advanced.
        """
        options = UpdateOptions(
            version=version,
            label=None if label is None else str(label),
            strict=strict,
            kv_policy=kv_policy,
            verify=verify,
            base_version=base_version,
            cast=cast,
            expected_fingerprints=expected_fingerprints,
            check_finite=check_finite,
        )
        deadline = Deadline(self._timeout_s if timeout_s is None else check_timeout(timeout_s))
        with self._turn(deadline), tensors_of(named_tensors) as listed:
            self._refuse_open_session()
            return self._publish(listed, options, deadline)

    async def async_publish(self, named_tensors: AnyNamedTensors, **options: Any) -> SyncReport:
        """`publish` for a running event loop; takes the same arguments, and asynchronous iterators, which go on in that
        loop. Cancelling it ends the session first."""
        return await on_a_thread(self.publish, blocking(named_tensors), **options)

    async def async_send(self, named_tensors: AnyNamedTensors) -> SyncReport:
        """`send` for a running event loop; as `async_publish`."""
        return await on_a_thread(self.send, blocking(named_tensors))

    @property
    def in_session(self) -> bool:
        """An explicit session is open here: begun, and neither committed nor aborted."""
        return self._update is not None

    def begin(
        self,
        version: int | None = None,
        label: str | int | None = None,
        strict: bool = True,
        kv_policy: KvPolicyName | None = None,
        verify: VerifyMode = "pause",
        base_version: int | None = None,
        cast: bool = True,
        check_finite: bool = True,
        lease_s: float | None = None,
    ) -> int:
        """Open an explicit session and return its version to be; `send`, any number of times, then `commit` or `abort`.

        The engine forgets the session when nothing comes for `lease_s` (None: the publisher's `timeout_s`).
        """
        options = UpdateOptions(
            version=version,
            label=None if label is None else str(label),
            strict=strict,
            kv_policy=kv_policy,
            verify=verify,
            base_version=base_version,
            cast=cast,
            check_finite=check_finite,
            lease_s=lease_s,
        )
        deadline = Deadline(self._timeout_s)
        with self._turn(deadline):
            self._refuse_open_session()
            self._update, _ = self._opened(options, deadline, lambda update: None)
            return self._update.version

    async_begin = threaded(begin)

    def send(self, named_tensors: NamedTensors) -> SyncReport:
        """Stage tensors in the open session; returns when the engine has checked them and the tensors may change.

        After an error the session can only be ended: it commits all that was sent, or nothing.
        """
        deadline = Deadline(self._timeout_s)
        with self._turn(deadline):
            update = self._open_update()
            update.refuse_failed()
            before = update.num_tensors
            try:
                with tensors_of(named_tensors) as listed:
                    self._stage(update, listed, deadline, strict=False)
                update.settle(deadline)
            except BaseException as error:
                update.failed = error  # kept until the caller ends the session as well
                self._abandon(update, error, deadline)
                raise
            return update.staged_report(update.num_tensors - before)

    def stage(self, bring: Callable[[Update], int]) -> SyncReport:
        """As `send`, but `bring` fills the open session in its own way, and says how many tensors came."""
        deadline = Deadline(self._timeout_s)
        with self._turn(deadline):
            update = self._open_update()
            update.refuse_failed()
            try:
                return update.staged_report(bring(update))
            except BaseException as error:
                update.failed = error
                self._abandon(update, error, deadline)
                raise

    @contextmanager
    def exclusive(self) -> Iterator[bool]:
        """Other calls wait meanwhile; yields whether an explicit session is open."""
        with self._turn(Deadline(self._timeout_s)):
            yield self._update is not None

    def commit(self) -> SyncReport:
        """End the open session with a new version; with an error when it had failed, or fails now."""
        deadline = Deadline(self._timeout_s)
        with self._turn(deadline):
            update = self._open_update()
            self._update = None
            return self._commit(update, deadline)

    async_commit = threaded(commit)

    def abort(self, reason: str = "the trainer gave up") -> None:
        """End the open session without a trace; fine when there is none."""
        deadline = Deadline(self._timeout_s)
        with self._turn(deadline):
            update, self._update = self._update, None
            if update is not None and update.failed is None:
                self._abandon(update, reason, deadline)

    async_abort = threaded(abort)

    @contextmanager
    def session(self, **options: Any) -> "Iterator[PublishSession]":
        """`begin(**options)`, and at the end of the block `commit()`, or `abort()` when it raised."""
        self.begin(**options)
        session = PublishSession(self.send)
        try:
            yield session
        except BaseException as error:
            self.abort(f"{type(error).__name__}: {error}")
            raise
        session.report = self.commit()

    def engine_info(self) -> EngineInfo:
        """What the engine is and serves now."""
        deadline = Deadline(self._timeout_s)
        with self._turn(deadline):
            return self._endpoint.hello(deadline)

    def fingerprint(self) -> int:
        """The model fingerprint of the engine's resident bytes, read now; compare `weight_sync.fingerprint`."""
        deadline = Deadline(self._timeout_s)
        with self._turn(deadline):
            reply: FingerprintReply = deadline.call(self._endpoint.channel(), GetFingerprint())
            return reply.fingerprint

    def tensor_fingerprints(self) -> dict[str, int]:
        """The same of each tensor, by its canonical name."""
        deadline = Deadline(self._timeout_s)
        with self._turn(deadline):
            names = self._endpoint.hello(deadline).manifest.names
            reply: FingerprintReply = deadline.call(self._endpoint.channel(), GetFingerprint())
            values = np.frombuffer(reply.tensors, dtype="<u8").tolist()
            return dict(zip(names, values, strict=True))

    def close(self) -> None:
        """End an open session, give the arena and the connection back. Safe to repeat; the engine goes on.

        In a forked child it does nothing: the publisher is its parent's.
        """
        if not self._home.here:
            return
        with self._lock:
            self.abort("the publisher was closed")
            self._endpoint.close()

    def __enter__(self) -> "WeightPublisher":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def _turn(self, deadline: Deadline) -> Iterator[None]:
        """One call at a time; and whatever an interrupted one has left behind is given up first."""
        self._home.check()
        if not self._lock.acquire(timeout=deadline.left_s("its turn")):
            raise DeadlineExceeded(
                f"another call of this publisher took longer than {deadline.timeout_s:.3f} s; expected it to end; "
                "raise timeout_s, or use a publisher for each thread"
            )
        try:
            deadline.check_wanted()
            update = self._under_way
            if update is not None and update is not self._update:
                update.tell_abort("the call was interrupted")
                self._endpoint.drop_arena()
                self._under_way = None
            yield
        finally:
            self._lock.release()

    def _publish(
        self,
        listed: Iterable[tuple[str, torch.Tensor]],
        options: UpdateOptions,
        deadline: Deadline,
    ) -> SyncReport:
        def prepare(update: Update) -> list[PackedRows] | SyncReport | Selection | None:
            """What is known as a whole is checked before there is a session; and packed where there is room for all of
            it, or published at once."""
            if not is_listed(listed):
                return None
            selection = update.choose(listed, strict=options.strict)
            if update.packed.window is not None:
                return selection
            packed = update.pack(selection)
            if update.packed.transport == "cuda_ipc" and update.packed.manifest_known:
                report = self._publish_at_once(update, packed, deadline)
                if report is not None:
                    self._endpoint.note_commit(report.version)
                    return report
            return packed

        update, prepared = self._opened(options, deadline, prepare)
        if isinstance(prepared, SyncReport):
            return prepared
        try:
            if isinstance(prepared, list):
                for rows in prepared:
                    update.announce(rows, deadline)
            elif isinstance(prepared, Selection):
                assert update.packed.window is not None
                update.stage_window(update.packed.window, prepared, deadline)
            else:
                self._stage(update, listed, deadline, strict=options.strict)
        except BaseException as error:
            self._abandon(update, error, deadline)
            raise
        return self._commit(update, deadline)

    @staticmethod
    def _publish_at_once(
        update: Update, packed: list[PackedRows], deadline: Deadline
    ) -> SyncReport | None:
        """Messages take as long as the copies where nothing is carried, so none of them waits for another one."""
        try:
            return update.publish_at_once(packed, deadline)
        except DeadlineExceeded as error:
            error.add_note(_MAY_HAVE_COMMITTED)
            raise

    def _opened(
        self, options: UpdateOptions, deadline: Deadline, prepare: Callable[[Update], T]
    ) -> tuple[Update, T]:
        """An update whose session is open, and what `prepare` made of it before; in another arena where the engine has
        lost this one."""
        try:
            return self._opened_once(options, deadline, prepare)
        except ArenaGoneError:
            self._endpoint.drop_arena()
            return self._opened_once(options, deadline, prepare)

    def _opened_once(
        self, options: UpdateOptions, deadline: Deadline, prepare: Callable[[Update], T]
    ) -> tuple[Update, T]:
        update = self._new_update(options, deadline)
        # Copies into an arena may go on in other threads when this one is interrupted.
        self._under_way = update
        try:
            deadline.when_cancelled(lambda: update.tell_abort("the caller cancelled the update"))
            prepared = prepare(update)
            if isinstance(prepared, SyncReport):  # it is over already
                self._under_way = None
            else:
                update.begin(deadline)
        except ArenaGoneError:
            self._under_way = None
            raise
        except BaseException as error:
            self._abandon(update, error, deadline)
            raise
        return update, prepared

    def _new_update(self, options: UpdateOptions, deadline: Deadline) -> Update:
        packed = self._endpoint.arena(deadline)
        self._endpoint.check_same(strict=options.strict)
        return Update(
            channel=self._endpoint.channel(),
            packed=packed,
            options=options,
            selector=self._endpoint.selector(packed, deadline, cast=options.cast),
        )

    def _stage(
        self,
        update: Update,
        named_tensors: Iterable[tuple[str, torch.Tensor]],
        deadline: Deadline,
        *,
        strict: bool,
    ) -> None:
        """Pack and announce; one-shot iterators item by item, because they may reuse their memory."""
        selector, window = update.selector, update.packed.window
        if is_listed(named_tensors):
            selection = update.choose(named_tensors, strict=strict)
            if window is not None:
                update.stage_window(window, selection, deadline)
                return
            for packed in update.pack(selection):
                update.announce(packed, deadline)
            return
        if window is not None:
            update.stage_items(window, (selector.take((i,)) for i in named_tensors), deadline)
            selector.finish(strict=strict)
            return
        update.stage_each(named_tensors, self._bucket_bytes, deadline, strict=strict)

    def _commit(self, update: Update, deadline: Deadline) -> SyncReport:
        try:
            update.refuse_failed()
            report = update.commit(deadline)
        except BaseException as error:
            self._abandon(update, error, deadline)
            if isinstance(error, DeadlineExceeded):
                error.add_note(_MAY_HAVE_COMMITTED)
            raise
        self._under_way = None
        self._endpoint.note_commit(report.version)
        return report

    def _abandon(self, update: Update, error: BaseException | str, deadline: Deadline) -> None:
        """End the session over there; where that is not certain, never write into its arena again."""
        reason = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
        interrupted = not isinstance(error, Exception | str)
        ended = True
        if update.begun:
            wait_s = _INTERRUPT_WAIT_S if interrupted else deadline.grace_s(_ABORT_WAIT_S)
            ended = update.abort(reason, wait_s)
        if interrupted or not ended:
            self._endpoint.drop_arena()
        self._under_way = None

    def _open_update(self) -> Update:
        if self._update is None:
            raise SessionError(
                "no session is open here: expected begin() before send() or commit()"
            )
        return self._update

    def _refuse_open_session(self) -> None:
        if self._update is not None:
            raise SessionError(
                f"a session of this publisher is open (for version {self._update.version}); expected none; commit() or "
                "abort() it first, or send() into it"
            )
