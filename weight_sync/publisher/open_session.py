"""One session at an engine, as its trainer holds it: what was asked for, how it is opened, committed or ended."""

import operator
import secrets
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np

from ..errors import SessionError, WeightUpdateError
from ..report import SyncReport
from ..wire.channel import Channel
from ..wire.deadline import Deadline
from ..wire.messages import (
    MAX_LABEL_CHARS,
    MAX_VERSION,
    Abort,
    Begin,
    BeginReply,
    Commit,
    CommitReply,
    KvPolicyName,
    VerifyMode,
)
from ..wire.process import current_process
from ..wire.rpc_wire import check_timeout
from .selection import Layout

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
        # What an engine of this process took as it is, it could not tell those of others.
        for name in ("version", "base_version"):
            object.__setattr__(self, name, _number_of_version(name, getattr(self, name)))
        _check_label(self.label)
        _check_expected(self.expected_fingerprints)
        if self.lease_s is not None:
            check_timeout(self.lease_s, "lease_s")


def _number_of_version(name: str, value: Any) -> int | None:
    """A whole number of any library as Python's own."""
    if value is None:
        return None
    try:
        number = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = -1
    if not 0 <= number <= MAX_VERSION:
        raise WeightUpdateError(
            f"{name}: got {str(value)[:80]} ({type(value).__name__}), expected a whole number from 0 to 2**62; "
            "versions are counted, labels are free"
        )
    return number


def _check_expected(expected: Any) -> None:
    if expected is None:
        return
    if not isinstance(expected, Mapping) or not all(
        isinstance(value, int | np.integer) for value in expected.values()
    ):
        raise WeightUpdateError(
            f"expected_fingerprints: got {type(expected).__name__} {str(expected)[:60]}, expected a mapping of names "
            "to numbers of 64 bits, as weight_sync.tensor_fingerprint gives them"
        )


def _check_label(label: Any) -> None:
    if label is None:
        return
    text = str(label)
    if len(text) > MAX_LABEL_CHARS:
        raise WeightUpdateError(
            f"label: got {len(text)} characters, expected at most {MAX_LABEL_CHARS}; shorten it"
        )
    try:
        text.encode()
    except UnicodeEncodeError:
        raise WeightUpdateError(
            "label: got half of a surrogate pair, expected text; decode it with errors='replace'"
        ) from None


def check_choice(name: str, got: object, choices: tuple[object, ...]) -> None:
    """`ValueError` unless `got` is one of them."""
    if got not in choices:
        raise ValueError(
            f"{name}: got {got!r}, expected one of {', '.join(map(repr, choices))}; choose one of these"
        )


class EngineArena:
    """An arena that an engine has opened."""

    def __init__(self, layout: Layout, arena_id: int, transport: str) -> None:
        self.layout = layout
        """What lies where in it."""
        self.arena_id = arena_id
        """The engine's name for it."""
        self.transport = transport
        """How its bytes travel."""
        self.manifest_known = False
        """The engine has the layout's manifest, unless it has forgotten it."""


@dataclass(kw_only=True)
class OpenSession:
    """Its messages but for those that bring bytes. Not thread safe, but for `tell_abort`."""

    channel: Channel
    """To the engine that holds the session."""
    packed: EngineArena
    """Where the bytes go."""
    options: UpdateOptions
    """What was asked for."""
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

    def refuse_failed(self) -> None:
        """`SessionError` when it has failed: then it can only be ended."""
        if self.failed is not None:
            raise SessionError(
                f"the session failed earlier and nothing of it was written: {self.failed}; end it, and begin a new one"
            ) from self.failed

    def settle(self, deadline: Deadline) -> None:
        """Wait until the engine has taken what was announced; raises what it found."""

    def commit(self, deadline: Deadline) -> SyncReport:
        """Make it the served version. The answer means that the bytes are verified and the arena is free again."""
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
