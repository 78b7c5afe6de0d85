"""One update session as the engine sees it: what was promised, what has arrived, how long it may last."""

import enum
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch

from ..errors import FingerprintMismatch, ProtocolError, SessionBusy, WeightUpdateError
from ..layout.manifest import Manifest, mismatch
from ..plan.plan import Plan
from ..plan.plan_cache import KnownPlan
from ..staging.joined_group import JoinedGroup
from ..staging.joint_stage import JointStage
from ..staging.shadow_stage import StageMemory
from ..staging.stage import ArenaStage, Stage
from ..staging.uploaded_arena import UploadedStage
from ..wire.messages import Begin, Bucket
from .endings import drop_frames

MAX_NAMED = 20
"""Tensors that an error about fingerprints names one by one."""


class Phase(enum.Enum):
    """Where a session stands; it only ever moves down this list."""

    STAGING = "staging"
    """Buckets arrive; ending here costs nothing."""
    VOTED = "voted"
    """Complete and checked; the commit waits for a step boundary. Ending here costs nothing."""
    WRITING = "writing"
    """Resident bytes change; from here it is committed, rolled back, or torn."""
    ENDED = "ended"
    """Over, for whatever reason."""


@dataclass(slots=True, kw_only=True)
class Session:
    """Everything about the one open session. Used by the receiver's thread, and by the commit inside its pause."""

    request: Begin
    """How it was opened."""
    epoch: int
    """Its number at this engine."""
    version: int
    """Version to be."""
    label: str
    """Label to be."""
    known: KnownPlan
    """What may come, where it lies in the arena, and how it is written into the parameters."""
    stage: Stage
    """Where its bytes are until the commit."""
    phase: Phase = Phase.STAGING
    """Where it stands."""
    began: float = field(default_factory=time.perf_counter)
    """When `Begin` arrived, on the clock of the timings."""
    lease_end: float = field(init=False)
    """When it ends by itself, `time.monotonic()`."""
    stage_s: float = 0.0
    """Seconds spent on checking what was staged, and on putting it where the commit wants it."""
    awaits: bool = False
    """Bytes that were announced are on their way; they have a deadline of their own."""
    present: np.ndarray = field(init=False)
    """Which tensors of the manifest are complete, bool."""
    declared: np.ndarray = field(init=False)
    """What the trainer says about them where they are staged, uint64."""
    decoded: np.ndarray = field(init=False)
    """What it says about them as parameters, uint64."""

    def __post_init__(self) -> None:
        num_tensors = len(self.manifest.tensors)
        self.present = np.zeros(num_tensors, dtype=bool)
        self.declared = np.zeros(num_tensors, dtype=np.uint64)
        self.decoded = np.zeros(num_tensors, dtype=np.uint64)
        self.renew()

    @property
    def manifest(self) -> Manifest:
        """The arena's layout."""
        return self.known.plan.manifest

    @property
    def plan(self) -> Plan:
        """What writes it."""
        return self.known.plan

    def end(self) -> None:
        """Let go of the stage, whoever still holds this object (a traceback, for one)."""
        self.phase = Phase.ENDED
        drop_frames()  # before the memory that the stage was lent goes back
        self.stage.release()

    @contextmanager
    def awaiting_bytes(self) -> Iterator[None]:
        """While what was announced is on its way."""
        self.awaits = True
        try:
            yield
        finally:
            self.awaits = False

    def renew(self, lease_s: float | None = None) -> None:
        """A message of the session arrived: the lease starts again, with `lease_s` where that is longer."""
        own = self.request.lease_s
        self.lease_end = time.monotonic() + (own if lease_s is None else max(own, lease_s))

    @property
    def lease_left_s(self) -> float:
        """Seconds until it ends by itself."""
        return max(0.0, self.lease_end - time.monotonic())

    def busy(self) -> SessionBusy:
        """What another trainer is told meanwhile."""
        return SessionBusy(
            f"another update is under way: session {self.request.session_id} of process "
            f"{self.request.holder.pid} for version {self.version} ({self.phase.value}, lease left "
            f"{self.lease_left_s:.1f} s); expected none; wait for it, or end it in that process"
        )

    @property
    def complete(self) -> bool:
        """Every tensor of the manifest has arrived."""
        return bool(self.present.all())

    @property
    def indices(self) -> np.ndarray | None:
        """The tensors that have arrived, or None for all: whole-arena operations are much cheaper."""
        return None if self.complete else np.flatnonzero(self.present)

    def stage_bucket(self, bucket: Bucket) -> None:
        """Check one bucket against what the trainer declared and count it as complete."""
        indices = column(bucket.indices, "<u4")
        declared = column(bucket.fingerprints, "<u8").astype(np.uint64)
        decoded = declared
        if bucket.decoded is not None:
            decoded = column(bucket.decoded, "<u8").astype(np.uint64)
        for values in (declared, decoded):
            if len(indices) != len(values):
                raise ProtocolError(
                    f"a bucket has one fingerprint per tensor: got {len(indices)} indices and {len(values)} "
                    "fingerprints, expected as many of each; send both columns"
                )
        self._check_indices(indices)
        if not len(indices):
            return
        self.declared[indices], self.decoded[indices] = declared, decoded
        self.stage_s += self.stage.accept(indices, self._check_staged, self.lease_left_s, bucket.at)
        self.present[indices] = True

    def take_from_groups(self, memory: StageMemory, group: JoinedGroup) -> None:
        """From now on tensors may come over `group` as well; what is staged stays staged."""
        if isinstance(self.stage, UploadedStage):
            memory = self.stage.memory  # beside what is there
        if isinstance(self.stage, ArenaStage | UploadedStage):
            self.stage = JointStage(self.stage, memory, group, np.flatnonzero(self.present))

    def stage_trusted(self, sources: Mapping[int, torch.Tensor]) -> np.ndarray:
        """Stage tensors, by row, that nobody declared: what came is what was meant. Their fingerprints, by row."""
        indices = np.array(sorted(sources), dtype=np.int64)
        self._check_indices(indices)
        start = time.perf_counter()
        values = self.stage.put(sources)
        self.present[indices] = True
        self.declared[indices] = self.decoded[indices] = values
        self.stage_s += time.perf_counter() - start
        return values

    def _check_staged(self, rows: np.ndarray, values: np.ndarray) -> None:
        self.compare(values, rows, self.declared[rows], "staged")

    def compare(
        self, found: np.ndarray, indices: np.ndarray | None, declared: np.ndarray, where: str
    ) -> None:
        """`FingerprintMismatch`, naming the tensors, unless `found` is what was declared."""
        wrong = np.flatnonzero(found != declared)
        if not len(wrong):
            return
        positions = wrong if indices is None else indices[wrong]
        lines = [
            f"{self.manifest.tensors[position].name}: got {int(found[i]):#018x}, "
            f"expected {int(declared[i]):#018x}"
            for i, position in zip(wrong[:MAX_NAMED], positions[:MAX_NAMED], strict=True)
        ]
        if len(wrong) > MAX_NAMED:
            lines.append(f"... and {len(wrong) - MAX_NAMED} more")
        raise FingerprintMismatch(
            f"{where} bytes of {len(wrong)} tensors are not what the trainer sent:\n  "
            + "\n  ".join(lines)
            + "\ndo not write into the arena between a bucket and the end of its session; send again"
        )

    def _check_indices(self, indices: np.ndarray) -> None:
        if not len(indices):
            return
        if int(indices.max()) >= len(self.present):
            raise ProtocolError(
                f"a bucket names a tensor that the manifest does not have: got index {int(indices.max())}, "
                f"expected below {len(self.present)}; begin with the manifest that the bucket belongs to"
            )
        again = indices[self.present[indices]]
        unique, counts = np.unique(indices, return_counts=True)
        doubled = sorted({*again.tolist(), *unique[counts > 1].tolist()})
        if doubled:
            names = [f"{self.manifest.tensors[i].name}: sent more than once" for i in doubled]
            raise mismatch("the session got tensors twice", names, "send every tensor once")


def check_wishes(request: Begin, *, unstaged: bool) -> None:
    """Refuse what nobody can do; `unstaged`: its arena's bytes are written as they come."""
    if request.lease_s <= 0:
        raise ProtocolError(
            f"a lease must end: got {request.lease_s} s, expected more than 0; set lease_s"
        )
    if unstaged and not request.strict:
        raise WeightUpdateError(
            "an update without a stage must be complete: got strict=False with staging='none', expected strict=True; "
            "send all tensors, or stage them (staging='extra')"
        )


def column(data: bytes, dtype: str) -> np.ndarray:
    """A packed little-endian column of a message."""
    if len(data) % np.dtype(dtype).itemsize:
        raise ProtocolError(
            f"a packed column is cut: got {len(data)} bytes, expected a multiple of "
            f"{np.dtype(dtype).itemsize}; both sides must run the same release"
        )
    return np.frombuffer(data, dtype=dtype)
