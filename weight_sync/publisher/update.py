"""One update on the trainer's side: the rows packed so far, the buckets under way, and the timings."""

import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch

from ..errors import EngineDiedError, FingerprintMismatch
from ..report import SyncReport
from ..transports.chunks import ranges_of
from ..wire.deadline import Deadline
from ..wire.messages import BeginReply, Bucket, Commit
from .endpoint import PackedArena
from .open_session import OpenSession
from .packer import DevicePacker
from .selection import Selection, Selector
from .window import Window, WindowPart


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


@dataclass(kw_only=True)
class Update(OpenSession):
    """A session whose bytes are packed here. Not thread safe; the publisher holds its lock."""

    packed: PackedArena
    selector: Selector
    """What has been given so far."""
    _buckets: list[tuple[Bucket, "Future[Any]"]] = field(default_factory=list)
    _sent: list["Future[None]"] = field(default_factory=list)
    _unchecked: list[np.ndarray] = field(default_factory=list)
    """Rows that were packed and may not be finite, ascending."""
    _decoded: dict[int, int] = field(default_factory=dict)
    """Fingerprints of rows that are in the arena as something else."""

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

    def choose(
        self, named_tensors: Iterable[tuple[str, torch.Tensor]], *, strict: bool
    ) -> Selection:
        """Sort what exists at once into rows, and raise what is wrong with it. A GPU packs meanwhile what is as before:
        looking takes longer."""
        packer = self.packed.packer
        ahead = None
        if packer is not None and self.channel.dead is None:
            ahead = partial(packer.pack_ahead, check_finite=self.options.check_finite)
        try:
            selection = self.selector.take(named_tensors, ahead)
            self.selector.finish(strict=strict)
        except BaseException:
            if packer is not None:
                packer.wait()
            raise
        return selection

    def pack(self, selection: Selection) -> list[PackedRows]:
        """Copy the selected rows into the arena, bucket by bucket; needs no session yet."""
        self.count(selection)
        if self.packed.packer is not None:
            return self._pack_on_device(self.packed.packer, selection)
        given, tensors = selection.in_order()
        if len(given) == len(self.packed.views):
            buckets = [list(bucket) for bucket in self.packed.layout.carried.buckets]
        else:
            buckets = self._split(given.tolist())
        packed, sources = [], iter(tensors)
        for rows in buckets:
            self.copy(rows, list(islice(sources, len(rows))))
            packed.append(self.finish(rows))
        return packed

    @contextmanager
    def _packing(self, begun_at: float | None = None) -> Iterator[None]:
        """Counts as packing, from `begun_at` on; a range, while this process is profiled."""
        start = time.perf_counter() if begun_at is None else begun_at
        if torch.autograd.profiler._is_profiler_enabled:
            with torch.profiler.record_function("pack"):
                yield
        else:
            yield
        self.pack_s += time.perf_counter() - start

    def _pack_on_device(self, packer: DevicePacker, selection: Selection) -> list[PackedRows]:
        """Everything in one go; announced in one piece where the engine sees the arena, else bucket by bucket."""
        if self.channel.dead is not None:
            packer.wait()
            raise EngineDiedError(self.channel.dead)
        with self._packing(packer.begun_at):
            rows, sources = selection.as_given()
            values, suspects = packer.pack(
                rows,
                sources,
                check_finite=self.options.check_finite,
                addresses=selection.addresses,
                layouts=selection.layouts,
            )
        order = np.argsort(rows, kind="stable")
        rows, values = rows[order], values[order]
        lengths = [len(rows)] if self.packed.seen else map(len, self._split(rows.tolist()))
        packed, first = [], 0
        for length in lengths:
            last = first + length
            packed.append(self._counted(rows[first:last], values[first:last]))
            first = last
        self._unchecked.append(suspects)
        return packed

    def stage_window(self, window: Window, selection: Selection, deadline: Deadline) -> None:
        """Pack and announce through an arena that is a window, half by half; needs the session."""
        self.count(selection)
        given, tensors = selection.in_order()
        sources = iter(tensors)
        for rows in window.split(given.tolist()):
            place = self._next_half(window, deadline).place(rows)
            with self._packing():
                values = place.pack(
                    list(islice(sources, len(rows))), check_finite=self.options.check_finite
                )
            self._announce_half(rows, values, place, deadline)

    def stage_each(
        self,
        named_tensors: Iterable[tuple[str, torch.Tensor]],
        bucket_bytes: int,
        deadline: Deadline,
        *,
        strict: bool,
    ) -> None:
        """Pack and announce tensors that come one by one into an arena that holds them all."""
        pending: list[int] = []
        num_bytes = 0
        for item in named_tensors:  # to its end even after a problem: it may be a collective
            selection = self.selector.take((item,))
            rows = list(selection.sources)
            self.copy(rows, list(selection.sources.values()))
            self.count(selection)
            pending += rows
            num_bytes += int(self.packed.num_bytes[rows].sum())
            if num_bytes >= bucket_bytes:
                self.announce(self.finish(pending), deadline)
                pending, num_bytes = [], 0
        self.selector.finish(strict=strict)
        if pending:
            self.announce(self.finish(pending), deadline)

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
        with self._packing():
            layout, views = self.packed.layout, self.packed.views
            arena = [views[i] for i in rows]
            values = layout.encoding.encode(layout.manifest, rows, sources, arena)
            if values is not None:
                self._decoded.update(zip(rows, values.tolist(), strict=True))

    def finish(self, rows: list[int]) -> PackedRows:
        """Fingerprint rows that are complete in the arena."""
        with self._packing():
            indices = np.array(sorted(rows), dtype=np.int64)
            everything = len(rows) == len(self.packed.views)
            values = self.packed.fingerprints.values(
                self.packed.buffer, None if everything else indices
            )
            if self.options.check_finite:
                self._unchecked.append(indices)
            return self._counted(indices, values.numpy().view(np.uint64))

    def announce(self, packed: PackedRows, deadline: Deadline) -> None:
        """Tell the engine that rows are complete, without waiting for its answer."""
        self._submit_bucket(packed, deadline)  # it must know what comes before it comes
        sent = self.packed.arena.send(
            ranges_of(self.packed.layout.carried, packed.indices), deadline.left_s("send")
        )
        if sent is not None:
            self._in_step = False
            self._sent.append(sent)
        self._raise_early()

    def settle(self, deadline: Deadline) -> None:
        """Wait until the engine has checked every bucket; raises what it found, else why it could not be sent."""
        self._check_finite()
        while self._buckets:
            deadline.wait(self._buckets.pop(0)[1], "Bucket")
        while self._sent:
            deadline.wait(self._sent.pop(0), "send")
        self._in_step = True

    def commit(self, deadline: Deadline) -> SyncReport:
        """As a session's. What was packed is looked at first: all of it is finite."""
        self._check_finite()
        return super().commit(deadline)

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
