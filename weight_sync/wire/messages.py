"""Everything that a trainer and an engine say to each other about weights, as typed and bounded messages.

    trainer -> engine       engine -> trainer
    Hello, GetIgnored       EngineInfo, IgnoredReply
    JoinGroup, LeaveGroup   Ack, Ack
    OpenArena, CloseArena   ArenaOpened, Ack
    Begin                   BeginReply
    Bucket, Receive         BucketReply, BucketReply
    Vote, Commit, Abort     Ack, CommitReply, Ack
    SetLabel                Ack
    GetFingerprint          FingerprintReply

Any of them may be answered with `ErrorReply` instead. Per-tensor columns travel as packed little-endian arrays
(`bytes`), so that a message about 20,000 tensors costs no more than a message about one. No bytes of a weight are
ever in a message.
"""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from ..layout.fused import Fused, Name
from ..layout.manifest import MAX_TENSORS, WireManifest

PROTOCOL_VERSION = 4
"""Raised when a message changes its meaning; peers of different versions refuse each other."""
MAX_MESSAGE_BYTES = 64 << 20
"""Longest message that either side accepts."""

MAX_LABEL_CHARS = 512
Label = Annotated[str, Meta(max_length=MAX_LABEL_CHARS)]
SessionId = Annotated[str, Meta(min_length=1, max_length=128)]
Count = Annotated[int, Meta(ge=0)]
MAX_VERSION = 2**62
Version = Annotated[int, Meta(ge=0, le=MAX_VERSION)]
Seconds = Annotated[float, Meta(ge=0, le=7 * 86_400)]
Indices = Annotated[bytes, Meta(max_length=4 * MAX_TENSORS)]
Fingerprints = Annotated[bytes, Meta(max_length=8 * MAX_TENSORS)]
KvPolicyName = Literal["keep", "recompute", "flush"]
VerifyMode = Literal["pause", "overlapped"]
Staging = Literal["extra", "kv_cache", "none"]


class Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """Base of all messages: immutable, closed, and told apart by the class's name in the field `type`."""


class ProcessRef(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One process, told apart from a later one that got the same process id."""

    host: Annotated[str, Meta(max_length=256)]
    """Which machine and which process-id namespace; equal on both sides or the process cannot be watched."""
    pid: Count
    """Process id there."""
    start_time: Count
    """Start of the process in clock ticks since boot, field 22 of `/proc/<pid>/stat`."""


class SharedMemoryHandle(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="shared_memory"
):
    """An arena in an anonymous, sealed memory file of the trainer."""

    owner: ProcessRef
    """The trainer."""
    fd: Count
    """Its descriptor of the memory file."""
    num_bytes: Count
    """Bytes of the arena behind the header."""
    nonce: Annotated[bytes, Meta(min_length=16, max_length=16)]
    """Random bytes that the header repeats, so that another file is never taken for the arena."""


class LocalHandle(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="local"
):
    """An arena of this process, lent to the service beforehand."""

    key: Annotated[str, Meta(max_length=64)]
    """What `WeightService.lend` returned."""
    num_bytes: Count
    """Bytes of the arena."""


class GroupHandle(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="process_group"
):
    """An arena whose bytes an update group brings to every engine rank; the ranks have joined it before."""

    owner: ProcessRef
    """Who asked for it; the ranks' part of it goes when it dies."""
    group_name: Annotated[str, Meta(min_length=1, max_length=256)]
    """As in `JoinGroup`."""
    num_bytes: Count
    """Bytes of the trainer's arena; a rank keeps only its own."""
    ends_group: bool = False
    """The group is there for this arena alone: the rank leaves it when the arena goes."""


class CudaIpcHandle(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="cuda_ipc"
):
    """An arena in memory of a GPU, which other processes of the machine can open."""

    owner: ProcessRef
    """The trainer."""
    device: Annotated[str, Meta(pattern="^[0-9a-f]{32}$")]
    """UUID of the GPU: numbers of GPUs differ from process to process."""
    memory: Annotated[bytes, Meta(min_length=64, max_length=64)]
    """The driver's handle of the allocation."""
    generation: Count
    """Which of the trainer's allocations it is; the driver may give a later one the same handle."""
    offset: Count
    """First byte of the arena's header in the allocation; the tensors follow one page behind."""
    num_bytes: Count
    """Bytes of the arena behind the header."""
    nonce: Annotated[bytes, Meta(min_length=16, max_length=16)]
    """Random bytes that the header repeats, so that other memory is never taken for the arena."""
    is_window: bool = False
    """It holds a bucket or two, not the model: the engine keeps what it has checked in memory of its own."""


ArenaHandle = SharedMemoryHandle | LocalHandle | GroupHandle | CudaIpcHandle


class Hello(Message, frozen=True, kw_only=True):
    """Who are you, and what do you hold?"""


class EngineInfo(Message, frozen=True, kw_only=True):
    """What a trainer must know in order to lay out its arena."""

    protocol: int
    """`PROTOCOL_VERSION` of the engine."""
    process: ProcessRef
    """The process that holds the weights."""
    engine_id: Annotated[str, Meta(max_length=128)]
    """Random for each receiver that was ever built: a restarted engine is another one."""
    version: int
    """Version that is served now."""
    label: Label | None
    """The caller's label of that version."""
    torn: str | None
    """Why the weights are a mixture, or None when they are whole."""
    manifest: WireManifest
    """The canonical tensors, in the order in which they lie in memory."""
    aliases: dict[Name, Name]
    """Other names of a whole canonical tensor, such as a tied `lm_head.weight`."""
    fused: dict[Name, Fused]
    """Names for several canonical tensors in one: joined, or stacked."""
    device: Annotated[str, Meta(max_length=64)]
    """Device of the weights."""
    tp_size: Count
    """Tensor-parallel ranks."""
    transports: tuple[Annotated[str, Meta(max_length=32)], ...]
    """What `OpenArena` accepts."""


class GetIgnored(Message, frozen=True, kw_only=True):
    """Which of these names, unknown to the manifest, may a trainer send all the same?"""

    names: Annotated[tuple[Name, ...], Meta(max_length=MAX_TENSORS)]
    """Names to look at."""


class IgnoredReply(Message, frozen=True, kw_only=True):
    """Those that have no memory here and are left out silently, such as rotary tables."""

    names: Annotated[tuple[Name, ...], Meta(max_length=MAX_TENSORS)]
    """The ignored ones among those asked for."""


class OpenArena(Message, frozen=True, kw_only=True):
    """Map the trainer's arena and keep it; opened once, used by many sessions."""

    handle: ArenaHandle
    """Where the bytes are."""
    staging: Staging = "extra"
    """Where they wait for a commit, if they do not stay where they are; see `WeightPublisher`."""


class ArenaOpened(Message, frozen=True, kw_only=True):
    """The arena can be read."""

    arena_id: Count
    """What `Begin` and `CloseArena` call it."""


class CloseArena(Message, frozen=True, kw_only=True):
    """The trainer will not use the arena again; closing an unknown one is fine."""

    arena_id: Count
    """What `ArenaOpened` said."""


class Ack(Message, frozen=True, kw_only=True):
    """Done; nothing to tell."""


class Begin(Message, frozen=True, kw_only=True):
    """Open the one session that an engine may have."""

    session_id: SessionId
    """Random, chosen by the trainer."""
    holder: ProcessRef
    """The trainer; when it dies, the session ends."""
    version: Version | None
    """Version to be; None: one above the current. Must be above the current."""
    base_version: int | None
    """Version that the trainer believes is served; None: do not check."""
    label: Label | None
    """The caller's label; None: the version as a string."""
    manifest_digest: Annotated[str, Meta(max_length=64)]
    """`Manifest.digest` of the arena's layout."""
    manifest: WireManifest | None
    """The layout itself; None where the engine has seen the digest before."""
    arena_id: Count
    """Where the bytes will be."""
    encoding: Annotated[str, Meta(max_length=32)] = "full"
    """How tensors are written down there; the manifest is that of what is written."""
    strict: bool
    """Every parameter must be covered, or the commit is refused."""
    kv_policy: KvPolicyName | None
    """What the commit does with older KV; None: the engine's default."""
    check_finite: bool = True
    """Refuse what a plain trainer broadcasts when it has NaN or infinite values; a publisher looks before it "
    "commits."""
    verify: VerifyMode
    """Compare resident fingerprints inside the pause, or afterwards with the new tokens held back."""
    lease_s: Seconds
    """The session ends by itself this long after its last message."""


class BeginReply(Message, frozen=True, kw_only=True):
    """The session is open, or the manifest is needed first."""

    epoch: int
    """Number of this session here; later messages repeat it, or say 0 for the session of their id, which may then be on
    their way before this answer. 0 when `need_manifest`."""
    version: int
    """Version to be."""
    need_manifest: bool
    """True: nothing was opened; begin again with the manifest."""


class Bucket(Message, frozen=True, kw_only=True):
    """These tensors are complete in the arena and will not change until the session has ended."""

    session_id: SessionId
    """As in `Begin`."""
    epoch: int
    """As in `BeginReply`."""
    indices: Indices
    """Positions in the manifest, uint32."""
    fingerprints: Fingerprints
    """What the trainer computed over those tensors in the arena, uint64, in the same order."""
    decoded: Fingerprints | None = None
    """The same over the tensors that they stand for; None: they are those tensors."""
    at: Count | None = None
    """Byte of the arena at which they begin, one behind the other on 256-byte boundaries and in ascending order: of an
    arena that holds less than the model. None: they are at their places in the manifest."""


class BucketReply(Message, frozen=True, kw_only=True):
    """The staged bytes are what the trainer declared."""

    num_staged: Count
    """Tensors of the session that are complete so far."""
    stage_s: float
    """Seconds that checking this bucket took."""
    received: Annotated[int, Meta(ge=0)] = 0
    """Of `Receive`: a fingerprint of what came, 64 bit unsigned, equal on all ranks."""


class JoinGroup(Message, frozen=True, kw_only=True):
    """Join the trainer's update group; `Ack` when all its members have come. Replaces an older group of that name."""

    group_name: Annotated[str, Meta(min_length=1, max_length=256)]
    """Unique on the engine."""
    master_address: Annotated[str, Meta(max_length=256)]
    """Host of the trainer's rendezvous."""
    master_port: Annotated[int, Meta(ge=1, le=65535)]
    """Its port."""
    rank_offset: Annotated[int, Meta(ge=1)]
    """Rank of the engine's first rank in the group; the trainer is 0."""
    world_size: Annotated[int, Meta(ge=2)]
    """Members: the trainer and every rank of every engine."""
    backend: Literal["gloo", "nccl"]
    """How the bytes go."""
    timeout_s: Seconds
    """Give up when not all members have come by then."""


class LeaveGroup(Message, frozen=True, kw_only=True):
    """Leave an update group."""

    group_name: Annotated[str, Meta(min_length=1, max_length=256)]
    """As in `JoinGroup`."""


class Receive(Message, frozen=True, kw_only=True):
    """Receive what a plain trainer broadcasts now, and stage it; answered by `BucketReply`.

    Without a fingerprint there is nothing to compare the bytes with but the other ranks' copies. All are received or,
    with an error, the group is left.
    """

    session_id: SessionId
    """As in `Begin`; the session's arena is a `GroupHandle`."""
    epoch: int
    """As in `BeginReply`."""
    group_name: Annotated[str, Meta(min_length=1, max_length=256)]
    """The group."""
    names: Annotated[tuple[Name, ...], Meta(max_length=MAX_TENSORS)]
    """Names in the order of the broadcasts."""
    dtypes: Annotated[tuple[Annotated[str, Meta(max_length=32)], ...], Meta(max_length=MAX_TENSORS)]
    """One dtype per name, with or without `torch.`; another than the engine's is cast."""
    shapes: Annotated[
        tuple[Annotated[tuple[Count, ...], Meta(max_length=16)], ...], Meta(max_length=MAX_TENSORS)
    ]
    """One shape per name."""
    layout: Literal["tensors", "bucket", "packed_bucket"]
    """One broadcast per tensor; one of a `FlattenedTensorBucket`; one of a bucket without padding."""
    timeout_s: Seconds
    """Give up when not all bytes have come by then."""
    fingerprint: Annotated[int, Meta(ge=0)] | None = None
    """`weight_sync.fingerprint` of the tensors in the trainer, under these names; None: it has not said."""


class Vote(Message, frozen=True, kw_only=True):
    """Can this rank commit? `Ack` says yes, and that it will not change its mind; rank 0 asks before it commits."""

    session_id: SessionId
    """As in `Begin`."""
    epoch: int
    """As in `BeginReply`."""
    lease_s: Seconds | None = None
    """How long it keeps its word when nothing comes; None: as long as the lease of the session."""


class Commit(Message, frozen=True, kw_only=True):
    """Make what was staged the next version, whole, between two steps."""

    session_id: SessionId
    """As in `Begin`."""
    epoch: int
    """As in `BeginReply`."""
    timeout_s: Seconds
    """Give up, unharmed, when the engine does not reach a step boundary within this time."""


class CommitReply(Message, frozen=True, kw_only=True):
    """The version is served and verified, and the arena may be written again."""

    version: int
    """The new version."""
    label: Label
    """Its label."""
    num_updated: Count
    """Tensors that were written."""
    left: Indices
    """Canonical tensors that were not sent, as positions in the canonical manifest, uint32."""
    fingerprint: Annotated[int, Meta(ge=0)]
    """Model fingerprint of everything that is resident now, 64 bit unsigned."""
    stage_s: float
    """Seconds spent on checking staged bytes."""
    begin_to_committed_s: float
    """From the arrival of `Begin` to the last byte written."""
    begin_to_verified_s: float
    """From the arrival of `Begin` to the resident bytes compared."""
    copy_s: float
    """Seconds of the write."""
    verify_s: float
    """Seconds of fingerprinting resident bytes."""
    pause_s: float
    """Seconds that the engine loop was held between two steps."""


class Abort(Message, frozen=True, kw_only=True):
    """Forget the session; whatever was staged costs nothing. Fine when it has ended already."""

    session_id: SessionId
    """As in `Begin`."""
    epoch: int
    """As in `BeginReply`; 0: whatever it is, after a `Begin` whose answer never came."""
    reason: Annotated[str, Meta(max_length=4096)]
    """For the log and for later messages of the same session."""


class SetLabel(Message, frozen=True, kw_only=True):
    """Call the weights that serve by another label, from a step boundary on; their bytes and their number stay."""

    label: Label
    """The new one."""
    nonce: SessionId
    """Random: what the step boundary is called on all ranks."""
    timeout_s: Seconds
    """Give up when the engine does not reach a step boundary within this time."""


class GetFingerprint(Message, frozen=True, kw_only=True):
    """Read what is resident."""


class FingerprintReply(Message, frozen=True, kw_only=True):
    """The resident bytes, summarised."""

    version: int
    """Version that they belong to."""
    label: Label | None
    """Its label."""
    torn: str | None
    """Why they are a mixture, or None."""
    fingerprint: Annotated[int, Meta(ge=0)]
    """Model fingerprint, 64 bit unsigned."""
    tensors: Fingerprints
    """One per canonical tensor, uint64, in manifest order."""


class ErrorReply(Message, frozen=True, kw_only=True):
    """The call failed."""

    code: Annotated[str, Meta(max_length=128)]
    """Class name of the error."""
    message: Annotated[str, Meta(max_length=1 << 20)]
    """What went wrong, what was got, what was expected, what to do."""


WeightRequest = (
    Hello
    | GetIgnored
    | OpenArena
    | CloseArena
    | Begin
    | Bucket
    | JoinGroup
    | LeaveGroup
    | Receive
    | Vote
    | Commit
    | Abort
    | SetLabel
    | GetFingerprint
)
WeightReply = (
    EngineInfo
    | IgnoredReply
    | ArenaOpened
    | Ack
    | BeginReply
    | BucketReply
    | CommitReply
    | FingerprintReply
)
