"""One update on the trainer's side: its session, the rows packed so far, the buckets under way, and the timings."""

import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import numpy as np
import torch

from ..errors import EngineDiedError, FingerprintMismatch, SessionError
from ..report import SyncReport
from ..transports.spans import spans_of
from ..wire.channel import Channel
from ..wire.deadline import Deadline
from ..wire.messages import (
    Abort,
    Begin,
    BeginReply,
    Bucket,
    Commit,
    CommitReply,
    KvPolicyName,
    VerifyMode,
)
from ..wire.process import current_process
from .endpoint import PackedArena
from .packer import DevicePacker
from .selection import Selection, Selector
from .window import Window, WindowPart

_ABORT_WAIT_S = 10.0
_ABORT_PATIENCE_S = 3600.0
"""How late an abort is carried out, should the engine read it late: it costs nothing, and a session left open does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateOptions:
    """What the caller of an update asked for; see `WeightPublisher.publish`."""

    version: int | None = None
    label: str | None = None
    strict: bool = True
    kv_policy: KvPolicyName | None = None
    verify: VerifyMode = "pause"
    base_version: int | None = None
    cast: bool = True
    expected_fingerprints: Mapping[str, int] | None = None
    check_finite: bool = True
    lease_s: float | None = None
    """None: as long as the update as a whole may take."""

    def __post_init__(self) -> None:
        check_choice("kv_policy", self.kv_policy, (None, *get_args(KvPolicyName)))
        check_choice("verify", self.verify, get_args(VerifyMode))


def check_choice(name: str, got: object, choices: tuple[object, ...]) -> None:
    """`ValueError` unless `got` is one of them."""
    if got not in choices:
        raise ValueError(
            f"{name}: got {got!r}, expected one of {', '.join(map(repr, choices))}; choose one of these"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedRows:
    """Rows of the arena that are complete."""

    indices: np.ndarray
    """Positions in the manifest, ascending, int64."""
    fingerprints: np.ndarray
    """One per row, of what is in the arena, uint64."""
    decoded: np.ndarray | None = None
    """One per row, of the tensors that it stands for, uint64; None: they are in the arena."""
    at: int | None = None
    """Where they begin in an arena that is a window."""


@dataclass(slots=True, kw_only=True)
class Update:
    """An open session. Not thread safe; the publisher holds its lock."""

    channel: Channel
    """To the engine that holds the session."""
    packed: PackedArena
    """Where the bytes go."""
    options: UpdateOptions
    """What was asked for."""
    selector: Selector
    """What has been given so far."""
    session_id: str = field(default_factory=lambda: secrets.token_hex(8))
    """Random."""
    epoch: int = 0
    """The engine's number of the session; 0 while it is not known, which means the session of this id."""
    version: int = 0
    """Version to be."""
    begun: bool = False
    """The engine may have a session for it."""
    failed: BaseException | None = None
    """Why it can only be ended any more."""
    num_tensors: int = 0
    num_bytes: int = 0
    pack_s: float = 0.0
    casts: list[tuple[str, str, str]] = field(default_factory=list)
    _buckets: list[tuple[Bucket, "Future[Any]"]] = field(default_factory=list)
    _sent: list["Future[None]"] = field(default_factory=list)
    _unchecked: list[np.ndarray] = field(default_factory=list)
    """Rows that were packed, and may not be finite."""
    _decoded: dict[int, int] = field(default_factory=dict)
    """Fingerprints of rows that are in the arena as something else."""
    _in_step: bool = True
    """The engine has taken all that was sent into a group: the next bytes will be the next bucket's at both ends."""

    def begin(self, deadline: Deadline) -> None:
        """Open the session; sends the manifest where the engine has not seen it."""
        self.begun = True
        for with_manifest in (False, True) if self.packed.manifest_known else (True,):
            request = self._begin_request(deadline, with_manifest=with_manifest)
            reply: BeginReply = deadline.call(self.channel, request)
            if not reply.need_manifest:
                break
        self.packed.manifest_known = True
        self._opened(reply)

    def publish_at_once(
        self, packed: Sequence[PackedRows], deadline: Deadline
    ) -> SyncReport | None:
        """Begin, announce and commit without waiting in between: one way there and one back for the whole update.

        None: the engine has forgotten the manifest, and nothing was opened. Errors are those of the first message that
        failed; those behind it fail because it did.
        """
        self._check_finite()
        self.begun = True
        opening = self._begin_request(deadline, with_manifest=False)
        opened = self.channel.submit(opening, deadline.left_s("begin"))
        for rows in packed:
            self._submit_bucket(rows, deadline)
        left_s = deadline.left_s("commit")
        request = Commit(session_id=self.session_id, epoch=self.epoch, timeout_s=left_s)
        committed = self.channel.submit(request, left_s)
        reply: BeginReply = deadline.wait(opened, "Begin")
        if reply.need_manifest:
            self._buckets.clear()
            self.packed.manifest_known = False
            return None
        self._opened(reply)
        self.settle(deadline)
        return self._report(deadline.wait(committed, "Commit"))

    def _begin_request(self, deadline: Deadline, *, with_manifest: bool) -> Begin:
        options, layout = self.options, self.packed.layout
        return Begin(
            session_id=self.session_id,
            holder=current_process(),
            version=options.version,
            base_version=options.base_version,
            label=options.label,
            manifest_digest=layout.carried.digest,
            manifest=layout.carried.to_wire() if with_manifest else None,
            arena_id=self.packed.arena_id,
            encoding=layout.encoding.name,
            strict=options.strict,
            kv_policy=options.kv_policy,
            verify=options.verify,
            check_finite=options.check_finite,
            lease_s=deadline.timeout_s if options.lease_s is None else options.lease_s,
        )

    def _opened(self, reply: BeginReply) -> None:
        self.epoch, self.version = reply.epoch, reply.version

    def pack(self, selection: Selection) -> list[PackedRows]:
        """Copy the selected rows into the arena, bucket by bucket; needs no session yet."""
        self.count(selection)
        sources = selection.sources
        if self.packed.packer is not None:
            return self._pack_on_device(self.packed.packer, sources)
        if len(sources) == len(self.packed.views):
            buckets = [list(bucket) for bucket in self.packed.layout.carried.buckets]
        else:
            buckets = self._split(sorted(sources))
        packed = []
        for rows in buckets:
            self.copy(rows, [sources[i] for i in rows])
            packed.append(self.finish(rows))
        return packed

    def _pack_on_device(
        self, packer: DevicePacker, sources: Mapping[int, torch.Tensor]
    ) -> list[PackedRows]:
        """Everything in one go; announced in one piece where the engine sees the arena, else bucket by bucket."""
        if self.channel.dead is not None:
            raise EngineDiedError(self.channel.dead)
        start = time.perf_counter()
        rows = sorted(sources)
        values = packer.pack(rows, [sources[i] for i in rows])
        self.pack_s += time.perf_counter() - start
        pieces = [rows] if self.packed.seen else self._split(rows)
        packed, first = [], 0
        for piece in pieces:
            last = first + len(piece)
            packed.append(self._counted(np.array(piece, dtype=np.int64), values[first:last]))
            first = last
        return packed

    def stage_window(self, window: Window, selection: Selection, deadline: Deadline) -> None:
        """Pack and announce through an arena that is a window, half by half; needs the session."""
        self.count(selection)
        sources = selection.sources
        for rows in window.split(sorted(sources)):
            place = self._next_half(window, deadline).place(rows)
            start = time.perf_counter()
            values = place.pack([sources[i] for i in rows])
            self.pack_s += time.perf_counter() - start
            self._announce_half(rows, values, place, deadline)

    def stage_items(
        self, window: Window, selections: Iterable[Selection], deadline: Deadline
    ) -> None:
        """The same for tensors that come one by one, and whose memory is used again for the next one."""
        rows: list[int] = []

        def flush() -> None:
            if rows:
                place = window.place(rows)
                self._announce_half(list(rows), place.read(), place, deadline)
                rows.clear()

        for selection in selections:
            self.count(selection)
            for row, source in selection.sources.items():
                if not window.fits_behind(rows, row):
                    flush()
                if not rows:
                    self._next_half(window, deadline)
                window.write(rows, row, source)
                rows.append(row)
        flush()

    def _next_half(self, window: Window, deadline: Deadline) -> Window:
        if self.channel.dead is not None:
            raise EngineDiedError(self.channel.dead)
        while len(self._buckets) > 1:  # the one before the last was in the half that comes now
            deadline.wait(self._buckets.pop(0)[1], "Bucket")
        window.turn()
        return window

    def _announce_half(
        self, rows: list[int], values: np.ndarray, place: WindowPart, deadline: Deadline
    ) -> None:
        if self.options.check_finite:
            place.check_finite()
        packed = self._counted(np.array(rows, dtype=np.int64), values)
        self._submit_bucket(replace(packed, at=place.at), deadline)
        self._raise_early()

    def count(self, selection: Selection) -> None:
        """Note what was given, for the report."""
        self.casts += selection.casts
        self.num_tensors += selection.num_tensors

    def copy(self, rows: list[int], sources: list[torch.Tensor]) -> None:
        """Copy tensors into the arena; dtype, strides and device may differ from the engine's."""
        if self.channel.dead is not None:
            raise EngineDiedError(self.channel.dead)
        if not rows:
            return
        start = time.perf_counter()
        layout, views = self.packed.layout, self.packed.views
        arena = [views[i] for i in rows]
        values = layout.encoding.encode(layout.manifest, rows, sources, arena)
        if values is not None:
            self._decoded.update(zip(rows, values.tolist(), strict=True))
        self.pack_s += time.perf_counter() - start

    def finish(self, rows: list[int]) -> PackedRows:
        """Fingerprint rows that are complete in the arena."""
        start = time.perf_counter()
        indices = np.array(sorted(rows), dtype=np.int64)
        everything = len(rows) == len(self.packed.views)
        values = self.packed.fingerprints.values(
            self.packed.buffer, None if everything else indices
        )
        packed = self._counted(indices, values.numpy().view(np.uint64))
        self.pack_s += time.perf_counter() - start
        return packed

    def announce(self, packed: PackedRows, deadline: Deadline) -> None:
        """Tell the engine that rows are complete, without waiting for its answer."""
        self._submit_bucket(packed, deadline)  # it must know what comes before it comes
        sent = self.packed.arena.send(
            spans_of(self.packed.layout.carried, packed.indices), deadline.left_s("send")
        )
        if sent is not None:
            self._in_step = False
            self._sent.append(sent)
        self._raise_early()

    def refuse_failed(self) -> None:
        """`SessionError` when it has failed: then it can only be ended."""
        if self.failed is not None:
            raise SessionError(
                f"the session failed earlier and nothing of it was written: {self.failed}; end it, and begin a new one"
            ) from self.failed

    def settle(self, deadline: Deadline) -> None:
        """Wait until the engine has checked every bucket; raises what it found, else why it could not be sent."""
        self._check_finite()
        while self._buckets:
            deadline.wait(self._buckets.pop(0)[1], "Bucket")
        while self._sent:
            deadline.wait(self._sent.pop(0), "send")
        self._in_step = True

    def commit(self, deadline: Deadline) -> SyncReport:
        """Make it the served version. The answer means that the bytes are verified and the arena is free again."""
        self._check_finite()
        left_s = deadline.left_s("commit")
        request = Commit(session_id=self.session_id, epoch=self.epoch, timeout_s=left_s)
        future = self.channel.submit(request, left_s)
        self.settle(deadline)
        return self._report(deadline.wait(future, "Commit"))

    def abort(self, reason: str, wait_s: float = _ABORT_WAIT_S) -> bool:
        """End the session on the engine's side; False when that is not certain within `wait_s`, and the arena still
        in use.

        Also when buckets of it were sent into a group and not all of them taken: that group cannot be used again.
        """
        future = self.tell_abort(reason)
        if future is None:
            return False
        try:
            future.result(wait_s)
        except Exception:  # whatever it is, it must not hide why the update is being aborted
            return False
        return self._in_step

    def tell_abort(self, reason: str) -> "Future[Any] | None":
        """Tell the engine to end the session, without waiting for it; None when it cannot be told. Any thread."""
        message = Abort(session_id=self.session_id, epoch=self.epoch, reason=reason[:4096])
        try:
            return self.channel.submit(message, _ABORT_PATIENCE_S)
        except Exception:
            return None

    def staged_report(self, num_tensors: int) -> SyncReport:
        """What an update call inside an explicit session answers: nothing is written yet."""
        return SyncReport(
            version=self.version,
            label=self.options.label,
            num_tensors=num_tensors,
            num_bytes=self.num_bytes,
            updated=0,
            transport=self.packed.transport,
            pack_s=self.pack_s,
            message=f"staged {num_tensors} tensors for version {self.version}; the end of the session commits them",
        )

    def _submit_bucket(self, packed: PackedRows, deadline: Deadline) -> None:
        bucket = Bucket(
            session_id=self.session_id,
            epoch=self.epoch,
            indices=packed.indices.astype("<u4").tobytes(),
            fingerprints=packed.fingerprints.astype("<u8").tobytes(),
            decoded=None if packed.decoded is None else packed.decoded.astype("<u8").tobytes(),
            at=packed.at,
        )
        self._buckets.append((bucket, self.channel.submit(bucket, deadline.left_s("stage"))))

    def _counted(self, indices: np.ndarray, fingerprints: np.ndarray) -> PackedRows:
        decoded = None
        if self._decoded:
            decoded = np.array([self._decoded.pop(i) for i in indices.tolist()], dtype=np.uint64)
        packed = PackedRows(indices=indices, fingerprints=fingerprints, decoded=decoded)
        self._check_expected(packed)
        if self.options.check_finite and self.packed.window is None:
            self._unchecked.append(packed.indices)
        self.num_bytes += int(self.packed.num_bytes[indices].sum())
        return packed

    def _check_finite(self) -> None:
        """`NonFiniteWeightsError` for what was packed and is not finite. The engine looks at the bytes meanwhile."""
        while self._unchecked:
            self.packed.finite.check(self.packed.buffer, self._unchecked.pop())

    def _split(self, rows: list[int]) -> list[list[int]]:
        """Rows in runs of at most a bucket's bytes."""
        sizes, limit = self.packed.num_bytes.tolist(), self.packed.layout.carried.bucket_bytes
        buckets: list[list[int]] = []
        size = limit
        for i in rows:
            num_bytes = sizes[i]
            if not buckets or size + num_bytes > limit:
                buckets.append([])
                size = 0
            buckets[-1].append(i)
            size += num_bytes
        return buckets

    def _raise_early(self) -> None:
        """Raise when the engine has refused a bucket: packing the rest would be in vain."""
        for _, future in self._buckets:
            if future.done():
                future.result()

    def _check_expected(self, packed: PackedRows) -> None:
        expected = self.options.expected_fingerprints
        if not expected:
            return
        cast = {name for name, _, _ in self.casts}
        tensors = self.packed.layout.manifest.tensors
        found = packed.fingerprints if packed.decoded is None else packed.decoded
        wrong = [
            f"{tensors[i].name}: got {int(value):#018x}, expected {expected[tensors[i].name]:#018x}"
            for i, value in zip(packed.indices.tolist(), found, strict=True)
            if tensors[i].name in expected
            and tensors[i].name not in cast
            and expected[tensors[i].name] != int(value)
        ]
        if wrong:
            raise FingerprintMismatch(
                f"{len(wrong)} tensors are not what their source declares:\n  "
                + "\n  ".join(wrong[:20])
                + "\nthe source is damaged or was changed; write it again"
            )

    def _report(self, reply: CommitReply) -> SyncReport:
        tensors = self.packed.layout.manifest.tensors
        left = np.frombuffer(reply.left, dtype="<u4")
        return SyncReport(
            version=reply.version,
            label=reply.label,
            num_tensors=self.num_tensors,
            num_bytes=self.num_bytes,
            updated=reply.num_updated,
            left=tuple(tensors[i].name for i in left),
            casts=tuple(self.casts),
            fingerprint=reply.fingerprint,
            transport=self.packed.transport,
            pack_s=self.pack_s,
            stage_s=reply.stage_s,
            copy_s=reply.copy_s,
            verify_s=reply.verify_s,
            pause_s=reply.pause_s,
            begin_to_committed_s=reply.begin_to_committed_s,
            begin_to_verified_s=reply.begin_to_verified_s,
        )
