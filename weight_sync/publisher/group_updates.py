"""Drives an engine whose weights come from a plain `torch.distributed` trainer over an update group.

The trainer broadcasts as rank 0 and knows nothing of sessions; whoever calls the engine on its behalf uses this. A
trainer that uses `WeightPublisher(..., transport="process_group")` needs none of it.
"""

import operator
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import msgspec

from ..errors import (
    ArenaGoneError,
    DeadlineExceeded,
    ManifestMismatch,
    SyncError,
    TransportError,
    WeightUpdateError,
)
from ..joint.engines import HasWeightChannel
from ..layout.manifest import dtype_name, parse_dtype
from ..report import SyncReport
from ..wire.channel import Channel
from ..wire.deadline import Deadline
from ..wire.messages import (
    ArenaOpened,
    CloseArena,
    EngineInfo,
    GroupHandle,
    Hello,
    JoinGroup,
    LeaveGroup,
    OpenArena,
    Receive,
)
from ..wire.process import current_process
from .open_session import EngineArena, OpenSession, UpdateOptions
from .selection import Layout

T = TypeVar("T")
Backend = Literal["gloo", "nccl"]
GroupLayout = Literal["tensors", "bucket", "packed_bucket"]
_GRACE_S = 5.0
"""How much later than the engine's own deadline an answer may come: it says more than ours would."""
_ABORT_WAIT_S = 10.0
_INTERRUPT_WAIT_S = 0.5
_LEAVE_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Announced:
    """What a trainer broadcasts."""

    names: Sequence[str]
    """Hugging Face names, in the order of the broadcasts."""
    dtypes: Sequence[str]
    """One for each."""
    shapes: Sequence[Sequence[int]]
    """Likewise."""
    layout: GroupLayout
    """One broadcast a tensor, or one for all."""
    fingerprint: int | None = None
    """`weight_sync.fingerprint` of the trainer's tensors, 64 bits; None: it has not said."""


class GroupUpdates:
    """Joins groups, and has an engine receive over them. Any thread may call.

    The trainer may be broadcasting as soon as it has asked for an update. So calls take their turns in the order in
    which they were made, and one that is refused before its bytes were taken leaves the group: else the next one would
    take them for its own.
    """

    def __init__(self, engine: HasWeightChannel, *, timeout_s: float) -> None:
        self._engine = engine
        self._timeout_s = timeout_s
        self._channel: Channel | None = None
        self._stages: dict[str, EngineArena] = {}
        self._turns: deque[threading.Event] = deque()
        self._lock = threading.Lock()
        self._receiving: OpenSession | None = None

    def join(
        self,
        *,
        group_name: str,
        master_address: str,
        master_port: int,
        rank_offset: int,
        world_size: int,
        backend: Backend,
        timeout_s: float | None = None,
    ) -> None:
        """Have every rank of the engine join the trainer's group; returns when all members have come."""
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        message = _checked(
            JoinGroup,
            WeightUpdateError,
            group_name=group_name,
            master_address=master_address,
            master_port=master_port,
            rank_offset=rank_offset,
            world_size=world_size,
            backend=backend,
            timeout_s=timeout_s,
        )
        with self._turn():
            self._close_stage(group_name)
            channel = self._open_channel()
        channel.call(message, timeout_s + _GRACE_S)

    def leave(self, group_name: str) -> None:
        """Have every rank leave the group; what it waits for over that group fails."""
        channel = self._open_channel()
        channel.call(LeaveGroup(group_name=group_name), self._timeout_s)
        self._close_stage(group_name)

    @contextmanager
    def taking(self, group_name: str) -> Iterator["Taking"]:
        """The turn of one call, during which it may `receive` once; without that, the group is left."""
        taking = Taking(self, group_name)
        try:
            with self._turn():
                yield taking
        except BaseException as error:
            if taking.taken or not self._left(group_name):
                raise
            told = (
                f"the engine has left group {group_name!r}, because what was broadcast for this call was not taken; "
                "make the group again with init_weights_update_group"
            )
            if isinstance(error, SyncError):
                raise type(error)(f"{error}; {told}") from error
            error.add_note(told)
            raise

    def interrupt(self, reason: str) -> None:
        """End the session of the call that waits for a trainer now, if there is one; that call fails."""
        update = self._receiving
        if update is not None:
            update.abort(reason)

    def close(self) -> None:
        """End an update that is under way and forget the stages; the engine keeps its groups."""
        self.interrupt("the engine was shut down")
        for name in list(self._stages):
            self._close_stage(name)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        mine = threading.Event()
        try:  # at whatever line it is interrupted
            with self._lock:
                self._turns.append(mine)
                self._turns[0].set()
            if not mine.wait(self._timeout_s):
                raise DeadlineExceeded(
                    f"other updates over a group took longer than {self._timeout_s:.3g} s; wait for them, or raise "
                    "request_timeout_s"
                )
            yield
        finally:
            with self._lock:
                if mine in self._turns:
                    self._turns.remove(mine)
                if self._turns:
                    self._turns[0].set()

    def _left(self, group_name: str) -> bool:
        """Whether there was such a group, which has been left now."""
        try:
            channel = self._open_channel()
            channel.call(LeaveGroup(group_name=group_name), _LEAVE_TIMEOUT_S)
        except TransportError:
            return False  # there is none
        except Exception:
            pass  # the engine is gone or stopped, or leaves when it comes to it
        with suppress(Exception):
            self._close_stage(group_name)
        return True

    def _open_channel(self) -> Channel:
        if self._channel is None or self._channel.dead is not None:
            self._channel = self._engine.weight_channel()
            self._stages.clear()
        return self._channel

    def _stage(self, group_name: str, deadline: Deadline) -> EngineArena:
        channel = self._open_channel()
        if group_name not in self._stages:
            info: EngineInfo = deadline.call(channel, Hello())
            layout = Layout(info, info.manifest.bucket_bytes)
            handle = GroupHandle(
                owner=current_process(),
                group_name=group_name,
                num_bytes=layout.manifest.arena_bytes,
            )
            opened: ArenaOpened = deadline.call(channel, OpenArena(handle=handle))
            self._stages[group_name] = EngineArena(layout, opened.arena_id, "process_group")
        return self._stages[group_name]

    def _close_stage(self, group_name: str) -> None:
        stage = self._stages.pop(group_name, None)
        if stage is not None and self._channel is not None and self._channel.dead is None:
            self._channel.call(CloseArena(arena_id=stage.arena_id), self._timeout_s)


class Taking:
    """One call's turn to take what a trainer broadcasts."""

    def __init__(self, updates: GroupUpdates, group_name: str) -> None:
        self._updates = updates
        self._group_name = group_name
        self.taken = False
        """What was broadcast has been received, for good or in vain."""

    def update(self, options: UpdateOptions, announced: Announced) -> SyncReport:
        """Make what the trainer broadcasts the next version, in a session of its own."""
        deadline = Deadline(self._updates._timeout_s)
        try:
            update = self._begun(options, deadline)
        except ArenaGoneError:
            self._updates._stages.pop(self._group_name, None)
            update = self._begun(options, deadline)
        try:
            self._receive(update, announced, deadline)
            return update.commit(deadline)
        except BaseException as error:
            _abort(update, error, deadline)
            raise

    def _begun(self, options: UpdateOptions, deadline: Deadline) -> OpenSession:
        updates = self._updates
        stage = updates._stage(self._group_name, deadline)
        update = OpenSession(channel=updates._open_channel(), packed=stage, options=options)
        deadline.when_cancelled(lambda: update.tell_abort("the caller cancelled the update"))
        try:
            update.begin(deadline)
        except BaseException as error:
            _abort(update, error, deadline)
            raise
        return update

    def stage(self, update: OpenSession, announced: Announced) -> int:
        """Receive into a session that is open; how many tensors came."""
        deadline = Deadline(self._updates._timeout_s)
        deadline.when_cancelled(lambda: update.tell_abort("the caller cancelled the update"))
        self._updates._stage(self._group_name, deadline)
        self._receive(update, announced, deadline)
        return len(announced.names)

    def _receive(self, update: OpenSession, announced: Announced, deadline: Deadline) -> None:
        timeout_s = deadline.left_s("receive")
        message = _checked(
            Receive,
            ManifestMismatch,
            session_id=update.session_id,
            epoch=update.epoch,
            group_name=self._group_name,
            names=announced.names,
            dtypes=announced.dtypes,
            shapes=announced.shapes,
            layout=announced.layout,
            timeout_s=timeout_s,
            fingerprint=announced.fingerprint,
        )
        self._updates._receiving = update
        try:
            future = update.channel.submit(message, timeout_s + _GRACE_S)
            Deadline(timeout_s + _GRACE_S).wait(future, "Receive")
        except ManifestMismatch:
            self.taken = (
                True  # it says so after all bytes have come, or the engine has left the group
            )
            raise
        finally:
            self._updates._receiving = None
        self.taken = True
        _note(update, message)


def _checked(kind: type[T], refusal: type[WeightUpdateError], **fields: Any) -> T:
    """A message, with its fields checked here as at the other end of a wire; whole numbers may be of any library."""
    try:
        values = {"type": kind.__name__, **{name: _plain(value) for name, value in fields.items()}}
        return msgspec.convert(values, kind)
    except (TypeError, msgspec.ValidationError) as error:
        raise refusal(f"{kind.__name__}: {error}; correct the call's arguments") from None


def _plain(value: Any) -> Any:
    if isinstance(value, str | float) or value is None:
        return value
    if isinstance(value, Iterable):
        return [_plain(item) for item in value]
    return operator.index(value)


def _abort(update: OpenSession, error: BaseException, deadline: Deadline) -> None:
    interrupted = not isinstance(error, Exception)
    wait_s = _INTERRUPT_WAIT_S if interrupted else deadline.grace_s(_ABORT_WAIT_S)
    update.abort(f"{type(error).__name__}: {error}", wait_s)


def _note(update: OpenSession, message: Receive) -> None:
    """Count what was received, for the report."""
    layout = update.packed.layout
    update.num_tensors += len(message.names)
    for name, dtype, shape in zip(message.names, message.dtypes, message.shapes, strict=True):
        got = parse_dtype(dtype)
        num = 1
        for size in shape:
            num *= size
        update.num_bytes += num * got.itemsize
        i = layout.index.get(name)
        if i is not None and layout.dtypes[i] != got:
            update.casts.append((name, dtype_name(got), dtype_name(layout.dtypes[i])))
