"""Brings one replica to the version that the others serve, before it serves anything itself.

From the publisher's arena, which holds the last published bytes until the trainer packs the next ones; whoever writes
into it too early is found out by fingerprints. Otherwise from a replica that serves, through its `GetWeights`.
"""

from __future__ import annotations

import logging
import math
import secrets
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Self

import msgspec
import numpy as np
import torch

from weight_sync.errors import (
    FingerprintMismatch,
    StaleVersionError,
    SyncError,
    TornWeightsError,
    TransportError,
)
from weight_sync.joint.session import JointSession
from weight_sync.layout.manifest import Manifest
from weight_sync.publisher.publisher import WeightPublisher
from weight_sync.time_left import left_s
from weight_sync.wire.channel import Channel
from weight_sync.wire.futures import wait
from weight_sync.wire.messages import (
    ArenaHandle,
    Begin,
    BeginReply,
    Bucket,
    BucketReply,
    Commit,
    CommitReply,
    EngineInfo,
    FingerprintReply,
    GetFingerprint,
    GroupHandle,
    OpenArena,
    Receive,
)
from weight_sync.wire.process import current_process, host_id

from ..protocol.commands import GetWeights, WeightValues

logger = logging.getLogger(__name__)

CHUNK_BYTES = 16 << 20
"""Bytes of a parameter that are read from a peer at once, as float32."""


class ServedVersion(msgspec.Struct, frozen=True, kw_only=True):
    """What every replica of a pool should serve."""

    version: int
    """Its number; 0: what was loaded at the start."""
    label: str
    """Its label."""
    fingerprint: int | None
    """Of the resident bytes; None: nobody has looked yet."""


@dataclass(slots=True, kw_only=True)
class WatchedSession(JointSession):
    """A session of which one remembers what it brought."""

    num_tensors: int
    """Of the engines' own layout."""
    opaque: bool = False
    """Some of it came without fingerprints: from a plain trainer."""
    present: np.ndarray = field(init=False)
    """Which tensors of the manifest are staged, bool."""
    declared: np.ndarray = field(init=False)
    """Their fingerprints, uint64."""

    def __post_init__(self) -> None:
        num = self.num_tensors if self.manifest is None else len(self.manifest.names)
        self.present = np.zeros(num, dtype=bool)
        self.declared = np.zeros(num, dtype=np.uint64)

    def bucket(self, message: Bucket, end: float) -> Future[BucketReply]:
        asked = JointSession.bucket(self, message, end)
        self._note(message)
        return asked

    def _note(self, message: Bucket) -> None:
        """What is not sound is refused by every replica, and never committed."""
        size = len(message.indices) // 4
        if (len(message.indices), len(message.fingerprints)) != (4 * size, 8 * size):
            return
        indices = np.frombuffer(message.indices, dtype="<u4")
        known = indices < len(self.present)
        self.present[indices[known]] = True
        self.declared[indices[known]] = np.frombuffer(message.fingerprints, dtype="<u8")[known]

    def receive(self, message: Receive, end: float) -> Future[BucketReply]:
        self.opaque = True
        return JointSession.receive(self, message, end)


@dataclass(slots=True, kw_only=True)
class KnownArena:
    """An arena, and what its bytes were when they were last committed."""

    request: Begin
    """The session that committed them last: it names the layout."""
    handle: ArenaHandle
    """Where the arena is."""
    fingerprints: np.ndarray
    """One per tensor of the layout, uint64."""
    known: np.ndarray
    """Which of them the arena holds in the served version, bool."""

    @classmethod
    def after(cls, update: WatchedSession, old: Self | None, handle: ArenaHandle) -> Self | None:
        """What is known of the arena of `update`, which was just committed; `old` is what was known before."""
        if update.opaque or isinstance(handle, GroupHandle) or getattr(handle, "is_window", False):
            return None
        request, present = update.request, update.present
        new = cls(
            request=msgspec.structs.replace(request, manifest=update.manifest),
            handle=handle,
            fingerprints=update.declared.copy(),
            known=present.copy(),
        )
        if old is not None and old.layout == new.layout:
            new.fingerprints[~present] = old.fingerprints[~present]
            new.known |= old.known
        return new

    @property
    def layout(self) -> tuple[int, str]:
        """Which arena, and where what lies in it."""
        return self.request.arena_id, self.request.manifest_digest


def catch_up(
    member: Any,
    info: EngineInfo,
    served: ServedVersion,
    source: KnownArena | None,
    peers: Sequence[Any],
    group_host: str,
    end: float,
) -> int:
    """Make `member`, which described itself by `info`, hold the served version; returns its fingerprint.

    Raises a `WeightUpdateError` when it cannot be done here and now, `EngineDiedError` when the replica died.
    """
    # What was loaded at the start may be there to be replaced: all that matters is that it is everywhere the same.
    if info.version == served.version and (info.torn is None or served.version == 0):
        reply: FingerprintReply = member.channel.call(GetFingerprint(), left_s(end))
        return _checked(reply.fingerprint, member, served)
    if info.version >= served.version:
        raise StaleVersionError(
            f"{member.name} cannot go back: got version {info.version} ({info.torn or 'whole'}), expected "
            f"less than {served.version}, which the pool serves"
        )
    if source is not None:
        try:
            found = from_source(member, source, served, end)
        except member.gone:
            raise
        except SyncError as error:
            logger.info("%s: not from the arena: %s", member.name, error)
        else:
            return _checked(found, member, served)
    for peer in peers:
        try:
            found = from_peer(member, peer, info, served, group_host, end)
        except peer.gone as error:
            if member.channel.dead is not None:
                raise
            logger.info("%s: not from %s: %s", member.name, peer.name, error)
        else:
            return _checked(found, member, served)
    raise TornWeightsError(
        f"no replica, and no arena of a publisher, holds version {served.version} any more; publish a complete update"
    )


def _checked(found: int, member: Any, served: ServedVersion) -> int:
    if served.fingerprint is not None and found != served.fingerprint:
        raise FingerprintMismatch(
            f"{member.name} holds other weights than the pool serves: got fingerprint {found:#018x}, "
            f"expected {served.fingerprint:#018x} for version {served.version}; load the same weights everywhere, and "
            "do not update single replicas of a pool"
        )
    return found


def from_source(member: Any, source: KnownArena, served: ServedVersion, end: float) -> int:
    """Commit what the arena holds; returns the fingerprint. Raises a `WeightUpdateError` when it is not all there."""
    if not source.known.all():
        raise TransportError("the publisher's arena does not hold all of the served version")
    arena_id, request = source.request.arena_id, source.request
    if arena_id not in member.arenas:
        opened = member.channel.call(OpenArena(handle=source.handle), left_s(end))
        member.arenas[arena_id] = opened.arena_id
    session_id = secrets.token_hex(8)
    begin = Begin(
        session_id=session_id,
        holder=current_process(),
        version=served.version,
        base_version=None,
        label=served.label,
        manifest_digest=request.manifest_digest,
        manifest=request.manifest,
        arena_id=member.arenas[arena_id],
        strict=True,
        kv_policy=None,
        verify="pause",
        lease_s=max(1.0, left_s(end)),
    )
    opened_session: BeginReply = member.channel.call(begin, left_s(end))
    if opened_session.need_manifest:
        raise TransportError("the layout of the publisher's arena is not known here any more")
    rows = np.arange(len(source.known))
    bucket = Bucket(
        session_id=session_id,
        epoch=opened_session.epoch,
        indices=rows.astype("<u4").tobytes(),
        fingerprints=source.fingerprints.astype("<u8").tobytes(),
    )
    member.channel.call(bucket, left_s(end))
    commit = Commit(session_id=session_id, epoch=opened_session.epoch, timeout_s=left_s(end))
    reply: CommitReply = member.channel.call(commit, left_s(end))
    return reply.fingerprint


def from_peer(
    member: Any, peer: Any, info: EngineInfo, served: ServedVersion, group_host: str, end: float
) -> int:
    """Read every parameter of `peer` and publish it to `member`, whose `info` is given; returns the fingerprint."""
    manifest = Manifest.from_wire(info.manifest)
    elsewhere = info.process.host != host_id()
    with WeightPublisher(
        _Borrowed(member.channel),
        timeout_s=left_s(end),
        transport="process_group" if elsewhere else "auto",
        group_host=group_host,
    ) as publisher:
        report = publisher.publish(
            _read_all(peer, manifest, end), version=served.version, label=served.label
        )
    return report.fingerprint


class _Borrowed:
    """An engine for a publisher that gives nothing back which is not its own: the channel stays open."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self.call = channel.call
        self.submit = channel.submit
        self.lend = channel.lend

    def weight_channel(self) -> Channel:
        return self

    @property
    def is_local(self) -> bool:
        return self._channel.is_local

    @property
    def dead(self) -> str | None:
        return self._channel.dead

    def close(self, *, wait: bool = True) -> None:
        """The channel is another's."""


def _read_all(peer: Any, manifest: Manifest, end: float) -> Iterator[tuple[str, torch.Tensor]]:
    for meta in manifest.tensors:
        yield meta.name, _read(peer.ask, meta.name, meta.shape, end)


def _read(
    ask: Callable[..., Future[Any]], name: str, shape: tuple[int, ...], end: float
) -> torch.Tensor:
    """A parameter as float32, in which every value of the narrower floating-point dtypes is exact."""
    num_rows = shape[0] if shape else 1
    row_bytes = 4 * math.prod(shape[1:])
    step = max(1, CHUNK_BYTES // max(1, row_bytes))
    parts = []
    for first in range(0, max(1, num_rows), step):
        question = GetWeights(name=name, truncate_size=step, first_row=first)
        asked = ask(question, timeout_s=left_s(end))
        values: WeightValues = wait(asked, left_s(end), "GetWeights")
        data = (
            torch.frombuffer(bytearray(values.data), dtype=torch.float32)
            if values.data
            else (torch.empty(0))
        )
        parts.append(data.reshape(values.shape))
    return torch.cat(parts) if shape else parts[0]
