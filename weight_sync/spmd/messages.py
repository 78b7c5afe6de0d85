"""What the ranks of one trainer say to their rank 0 while they publish together.

    rank -> rank 0      rank 0 -> rank
    Offer               Grant, once every rank has offered
    Describe            Grant with the plan, once every rank has described its shards
    Wrote               Noted
    Finish              Outcome, once the engines have committed
    Heard               Noted

Any of them may be answered with an error, which is then the error of all ranks. Weights are never in a message.
"""

from typing import Annotated

import msgspec
from msgspec import Meta

from ..layout.manifest import MAX_ARENA_BYTES, MAX_TENSORS
from ..report import SyncReport
from ..wire.messages import Count, EngineInfo, Message, Name, ProcessRef, SharedMemoryHandle

Size = Annotated[int, Meta(ge=0, lt=MAX_ARENA_BYTES)]
Ranges = tuple[tuple[Size, Size], ...]


class SpmdMessage(Message, frozen=True, kw_only=True):
    """Base of what a rank sends."""

    secret: Annotated[bytes, Meta(min_length=16, max_length=16)]
    """What rank 0 gave out over the mesh; whoever does not know it is not of this trainer."""
    rank: Count
    """Position of the sender in the mesh, row by row."""
    update: Count
    """Which update, counted by every rank from 1."""


class Offer(SpmdMessage, frozen=True, kw_only=True):
    """The rank has its tensors and takes part."""

    process: ProcessRef
    """The sender, to be watched."""
    plan: Count
    """The plan under which the same tensors were published last; 0: none, or they have changed."""
    engine: str | None
    """Address of an engine that this rank brings; None: it brings none."""


class Tensor(
    msgspec.Struct, frozen=True, kw_only=True, array_like=True, forbid_unknown_fields=True
):
    """One tensor as a rank has it."""

    name: Name
    """Its Hugging Face name."""
    shape: tuple[Size, ...]
    """Shape of the full tensor."""
    dtype: Annotated[str, Meta(max_length=32)]
    """Such as "bfloat16"."""
    regions: tuple[Ranges, ...]
    """Parts of it that the rank holds."""


class Describe(SpmdMessage, frozen=True, kw_only=True):
    """Everything that the rank has."""

    tensors: Annotated[tuple[Tensor, ...], Meta(max_length=MAX_TENSORS)]
    """In the order of its batch."""


class Wrote(SpmdMessage, frozen=True, kw_only=True):
    """The rank's parts of one bucket are in the arena."""

    bucket: Count
    """Which one."""
    values: Annotated[bytes, Meta(max_length=8 * MAX_TENSORS)]
    """Fingerprint summands of the bucket's rows, uint64, little-endian."""


class Finish(SpmdMessage, frozen=True, kw_only=True):
    """The rank has written all its parts."""

    twins: Annotated[bytes, Meta(max_length=8 * MAX_TENSORS)]
    """Summands of tensors that share a row with another name (tied weights), in the plan's order."""


class Failed(SpmdMessage, frozen=True, kw_only=True):
    """The rank cannot go on, and so nobody can."""

    code: Annotated[str, Meta(max_length=128)]
    """Class of the error."""
    message: str
    """Its text."""


class Heard(SpmdMessage, frozen=True, kw_only=True):
    """The rank has its outcome: rank 0 may close."""


class PlanReply(
    msgspec.Struct, frozen=True, kw_only=True, array_like=True, forbid_unknown_fields=True
):
    """How this rank's tensors go into the arena."""

    plan: Count
    """Its number."""
    engine: EngineInfo
    """Whose layout the arena has."""
    bucket_bytes: Count
    """Bytes of a bucket."""
    arena: SharedMemoryHandle
    """The memory."""
    rows: bytes
    """Rows of the manifest that the update covers, ascending, uint32, little-endian."""
    writes: bytes
    """One byte for each of the rank's parts, in the order of `spmd_plan.parts_of`: 1 if this rank is the one to write
    it, 2 if it counts it for another name of a row."""
    ignored: tuple[Name, ...]
    """Names that the engine has no use for."""


class Grant(Message, frozen=True, kw_only=True):
    """Go on."""

    describe: bool = False
    """Describe your tensors first: there is no plan, or it does not hold any more."""
    plan: PlanReply | None = None
    """The new plan; None: the one that was offered holds."""


class Noted(Message, frozen=True, kw_only=True):
    """Taken note of."""


class Outcome(Message, frozen=True, kw_only=True):
    """The engines serve the new version."""

    report: SyncReport
    """Of the rank's own engine: the one that it, or the nearest rank before it, has brought."""


RankRequest = Offer | Describe | Wrote | Finish | Failed | Heard
RankReply = Grant | Noted | Outcome
