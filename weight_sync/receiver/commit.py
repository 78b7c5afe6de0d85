"""The write itself: the only code that changes resident weights, and the only place where an update can tear them.

write        between two steps: replay the plan, compare (verify="pause"), tell the host
verify       verify="overlapped": compare while the engine runs on, its new tokens held back
roll back    after any failure that came later than the first byte: from the kept copy, from a stage that was exchanged
             with the parameters, or else TORN
"""

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import NoReturn

import numpy as np
import torch

from ..errors import (
    DeadlineExceeded,
    EngineDiedError,
    SyncError,
    TornWeightsError,
    WeightUpdateError,
)
from ..layout.parallel_copy import copy_tensors
from ..staging.stage import Written, as_uint64
from ..time_left import left_s
from .agreement import RankAgreement, check_in_time, together, whole_values
from .host import WeightHost
from .session import Phase, Session


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """Which weights are resident."""

    version: int
    """Monotone."""
    label: str
    """The caller's name for them."""
    torn: str | None = None
    """Why they are a mixture, or None; then `version` is the last whole one."""


class Snapshot:
    """A copy of all parameters that is made before a commit and restored when it fails.

    It costs the model's size in memory, and one more copy per update, outside the pause.
    """

    def __init__(self, parameters: Mapping[str, torch.Tensor]) -> None:
        self._live = [parameter.detach() for parameter in parameters.values()]
        self._kept = [torch.empty_like(parameter) for parameter in self._live]

    def take(self) -> None:
        """Keep what is resident now."""
        copy_tensors(self._kept, self._live)

    def restore(self) -> None:
        """Write back what was kept, into the same storage."""
        copy_tensors(self._live, self._kept)


@dataclass(slots=True, kw_only=True)
class WeightCommit:
    """One attempt to make a session's bytes the resident ones. Used once."""

    session: Session
    """Voted: complete as far as it has to be, staged bytes checked."""
    host: WeightHost
    """The engine."""
    served: Served
    """What is resident before."""
    torn_after: str | None
    """What is still not whole after this commit, where it repairs torn weights in part; else None."""
    snapshot: Snapshot | None
    """Holds what is resident before, or None: a failure after the first byte tears."""
    on_served: Callable[[Served], None]
    """Called inside the pause with what is resident now."""
    agreement: RankAgreement
    """All ranks commit, or none."""
    check_restored: Callable[[], None]
    """Raises unless the resident bytes are those from before, as far as that is known."""
    end: float
    """`time.monotonic()` after which it is not begun: whoever asked for it has been told that it was too late."""

    copy_s: float = 0.0
    verify_s: float = 0.0
    pause_s: float = 0.0
    committed_at: float = 0.0
    verified_at: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _started: bool = False
    _cancelled: bool = False
    _holding: bool = False
    _writing: bool = False
    """This rank has begun to change resident bytes."""

    def run(self) -> None:
        """Commit, or raise; then the previous version serves, except after `TornWeightsError`."""
        try:
            name, _ = boundary_names(self.session.request.session_id)
            self.host.between_steps(self._write, left_s(self.end), name)
        except BaseException:
            with self._lock:
                self._cancelled = not self._started
            raise
        if not self._started:
            raise DeadlineExceeded("the engine did not run the commit; the previous version serves")
        if self._holding:
            self._verify_overlapped()

    def _write(self) -> None:
        with self._lock:
            if self._cancelled:  # the caller gave up before the boundary came
                return
            self._started = True
        start = time.perf_counter()
        session = self.session
        if (gone := unwritable(self.host)) is not None:  # on all ranks or on none
            raise gone
        have_met = self._compare_staged()
        what = f"the commit of version {session.version}"
        check_in_time(self.agreement, self.end, what, have_met=have_met)
        overlapped = session.request.verify == "overlapped"
        if overlapped:
            self.host.hold_outputs()
            self._holding = True
        try:
            session.phase = Phase.WRITING
            if overlapped:
                together(self.agreement, self._write_and_tell)
            else:
                self._compare(partial(self._write_and_tell, read_back=True))
            self.on_served(
                Served(version=session.version, label=session.label, torn=self.torn_after)
            )
            if self.torn_after is not None:
                self.host.weights_torn(self.torn_after, session.version, session.label)
        except BaseException as error:
            self._undo(error)
        finally:
            self.pause_s += time.perf_counter() - start

    def _write_and_tell(self, *, read_back: bool = False) -> Written | None:
        # What the host has to do, it does while a GPU copies. Should the bytes turn out wrong, it is told again, or
        # that they are torn, before the next step.
        written = self._replay(read_back=read_back)
        self._tell_host()
        return written

    def _tell_host(self) -> None:
        # After torn weights, whatever was computed with them must go.
        kv_policy = "flush" if self.served.torn is not None else self.session.request.kv_policy
        self.host.weights_written(self.session.version, self.session.label, kv_policy)

    def _tell_host_of_the_old(self) -> None:
        self.host.weights_written(self.served.version, self.served.label, "flush")

    def _replay(self, *, read_back: bool) -> Written | None:
        start = time.perf_counter()
        with torch.no_grad(), self.host.named("commit"):
            self._writing = True
            written = self.session.stage.write(self.session.indices, read_back=read_back)
        self.committed_at = time.perf_counter()
        self.copy_s = self.committed_at - start
        return written

    def _compare_staged(self) -> bool:
        """Where no rank has seen whole tensors yet: nothing has been written so far, so a mismatch costs nothing.

        Whether the ranks have met for it."""
        session = self.session
        if not session.stage.in_parts:
            return False
        indices = session.indices
        regions = session.known.regions if indices is None else session.known.regions[indices]
        found = whole_values(self.agreement, lambda: session.stage.summands(indices), regions)
        declared = session.decoded if indices is None else session.decoded[indices]
        session.compare(found, indices, declared, "staged")
        return self.agreement.size > 1

    def _compare(self, first: Callable[[], Written | None]) -> None:
        """Compare what is resident on all ranks after `first`; where either fails on one, it has failed on all.

        `first` may have read it back; else it is read now.
        """
        session = self.session
        indices = session.indices
        regions = session.known.regions
        start = time.perf_counter()

        def read() -> np.ndarray:
            nonlocal start
            written = first()
            start = time.perf_counter()
            return written() if written else as_uint64(session.plan.resident_fingerprints(indices))

        with self.host.named("verify"):
            found = whole_values(
                self.agreement, read, regions if indices is None else regions[indices]
            )
        declared = session.decoded if indices is None else session.decoded[indices]
        session.compare(found, indices, declared, "resident")
        self.verified_at = time.perf_counter()
        self.verify_s += self.verified_at - start

    def _verify_overlapped(self) -> None:
        """All ranks come to the same answer, and let go of their tokens, or undo them, at one boundary."""
        try:
            together(self.agreement, lambda: self._compare(self.session.stage.after_write))
        except BaseException as error:
            failure = error
        else:
            self._holding = False
            self.host.release_outputs(True)
            return

        reached = False

        def undo() -> None:
            nonlocal reached
            reached = True
            start = time.perf_counter()
            try:
                self._undo(failure)
            finally:
                self.pause_s += time.perf_counter() - start

        try:
            name = f"undo/{self.session.request.session_id}"
            self.host.between_steps(undo, max(1.0, left_s(self.end)), name)
        except BaseException as late:
            if not reached:
                self._tear(f"{failure}; and the engine did not stop to undo it: {late!r}", failure)
            raise

    def _undo(self, error: BaseException) -> None:
        """Restore the previous version or declare the weights torn; raises in either case."""
        restore = self._previous(error)
        if restore is None:
            why = (
                "no copy of the previous version was kept"
                if not self.served.torn
                else "torn before"
            )
            self._tear(
                f"the commit of version {self.session.version} failed ({why}): {error}", error
            )
        try:
            together(self.agreement, restore)
            self.check_restored()
            together(self.agreement, self._tell_host_of_the_old)
            self.on_served(self.served)
        except BaseException as second:
            self._tear(f"the commit failed ({error}) and so did the roll-back: {second!r}", error)
        self._release(ok=False)
        text = f"{error}\nversion {self.served.version} was restored and serves"
        if isinstance(error, SyncError):
            raise type(error)(text) from error
        if isinstance(error, Exception):
            raise WeightUpdateError(
                f"the commit of version {self.session.version} failed with {type(error).__name__}: {text}"
            ) from error
        raise error

    def _previous(self, error: BaseException) -> Callable[[], None] | None:
        """What brings the previous version back on this rank, where all can do so, or None: it is lost."""
        if self.served.torn is not None:
            return None
        if self.snapshot is not None:
            return self.snapshot.restore
        if isinstance(error, EngineDiedError):  # nobody is left to ask
            return None
        able = not self._writing or self.session.stage.can_take_back()
        if self.agreement.size > 1:
            try:
                able = bool(self.agreement.gather(np.array([able], dtype=np.uint64)).all())
            except EngineDiedError:
                return None
        return self._take_back if able else None

    def _take_back(self) -> None:
        if self._writing:
            self.session.stage.take_back()

    def _tear(self, reason: str, error: BaseException) -> NoReturn:
        self.on_served(Served(version=self.served.version, label=self.served.label, torn=reason))
        self.host.weights_torn(reason, self.served.version, self.served.label)
        self._release(ok=False)
        if isinstance(error, EngineDiedError):  # nothing will repair it
            raise error
        raise TornWeightsError(
            f"{reason}\nthe engine refuses to generate; expected a complete update: publish all tensors again"
        ) from error

    def _release(self, *, ok: bool) -> None:
        if self._holding:
            self._holding = False
            self.host.release_outputs(ok)


def unwritable(host: WeightHost) -> WeightUpdateError | None:
    """Why nothing can be written into the parameters at present, or None."""
    why = host.unwritable()
    return None if why is None else WeightUpdateError(f"the parameters cannot be written: {why}")


def tear_for(
    session: Session | None, host: WeightHost, lose_weights: Callable[[str], None], end: float
) -> None:
    """`session` is about to write as its bytes come: from a step boundary on, the same on all ranks, nothing serves.

    `DeadlineExceeded`, and the old version goes on, where none comes before `end` (monotonic) and the lease's end.
    """
    assert session is not None, "it is open"

    def tear() -> None:
        if (gone := unwritable(host)) is not None:
            raise gone
        lose_weights(f"the update to version {session.version} without a stage was not completed")

    timeout_s = min(session.lease_left_s, left_s(end))
    host.between_steps(tear, timeout_s, boundary_names(session.request.session_id)[1])


def boundary_names(session_id: str) -> tuple[str, str]:
    """Under which all ranks do the same at the same step boundary: write a session; make room for one without a stage,
    which ends what runs."""
    return f"commit/{session_id}", f"unstaged/{session_id}"
