"""The receiver behind messages: calls from any thread, worked off in order on one staging thread."""

import logging
import secrets
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch

from ..devices.side_streams import work_on
from ..errors import DeadlineExceeded, ProtocolError, TransportError
from ..staging.opened_arena import OpenedArena, OpenedLocalArena
from ..staging.opened_cuda_ipc import OpenedAllocations, OpenedCudaIpcArena
from ..staging.opened_group import GroupTable, OpenedGroupArena
from ..staging.opened_shared_memory import OpenedSharedMemoryArena
from ..staging.shadow_stage import NoStageMemory, StageMemory
from ..staging.uploaded_arena import OpenedUploadedArena, needs_upload
from ..transports.ipc_memory import ipc_memory_of
from ..wire.call_queue import CallQueue
from ..wire.messages import (
    Abort,
    Ack,
    ArenaHandle,
    ArenaOpened,
    Begin,
    Bucket,
    CloseArena,
    Commit,
    CudaIpcHandle,
    GetFingerprint,
    GetIgnored,
    GroupHandle,
    Hello,
    JoinGroup,
    LeaveGroup,
    LocalHandle,
    OpenArena,
    Receive,
    SetLabel,
    SharedMemoryHandle,
    Vote,
)
from ..wire.rpc_wire import Call
from .receiver import WeightReceiver

logger = logging.getLogger(__name__)

_SWEEP_INTERVAL_S = 0.25
"""How often the lease and the life of a trainer are looked at while it holds something."""


class WeightService:
    """Serves one receiver. `handle` returns at once; the staging thread answers.

    Checking a bucket takes place on that thread while the engine generates. While bytes of a session are awaited, calls
    that are not the session's are answered.
    """

    def __init__(self, receiver: WeightReceiver, *, name: str = "weights") -> None:
        self.receiver = receiver
        self._groups = GroupTable(receiver.rank, receiver.device)
        # Weakly: nobody comes for what was lent by an update that gave up before its arena was opened.
        self._lent: weakref.WeakValueDictionary[str, torch.Tensor] = weakref.WeakValueDictionary()
        self._allocations = OpenedAllocations(lambda: ipc_memory_of(receiver.device))
        self._actions: dict[type, Callable[[Any], Any]] = {
            Hello: lambda _: receiver.info(),
            GetIgnored: lambda m: receiver.ignored(m.names),
            CloseArena: self._close_arena,
            Begin: receiver.begin,
            Bucket: receiver.stage,
            Vote: self._vote,
            JoinGroup: self._join,
            LeaveGroup: self._leave,
            Receive: lambda m: receiver.receive(m, self._groups.get(m.group_name)),
            Abort: self._abort,
            GetFingerprint: lambda _: receiver.fingerprint(),
        }
        self._queue = CallQueue(
            f"{name}-staging",
            serve=self._serve,
            missed=self._missed,
            pause=lambda: _SWEEP_INTERVAL_S if receiver.busy or len(self._groups) else None,
            idle=self._sweep,
            end=self._end,
            begin=lambda: work_on(receiver.device),
        )
        receiver.stages.wait_with(self._queue.wait)

    def handle(self, call: Call) -> None:
        """Queue a call; any thread. Its body is one of `messages.WeightRequest`."""
        if isinstance(call.body, Abort):  # not behind the write that it is to prevent
            self.receiver.give_up_write(call.body.session_id)
        self._queue.put(call)

    def lend(self, buffer: torch.Tensor) -> str:
        """Make a buffer of this process known; the key goes into a `LocalHandle`, which takes it. The lender holds it
        until then."""
        key = secrets.token_hex(8)
        self._lent[key] = buffer
        return key

    def close(self) -> None:
        """End the session, close the arenas, fail what is queued. Safe to repeat."""
        self._queue.close()

    @property
    def ended(self) -> bool:
        """Closed, and its thread is over: it reads and writes no weights any more."""
        return self._queue.ended

    def _sweep(self) -> None:
        self._groups.sweep()  # first: an arena goes with its group
        self.receiver.sweep()

    def _end(self) -> None:
        self.receiver.close()
        self._groups.close()
        self._lent.clear()

    def _missed(self, message: Any, late: DeadlineExceeded) -> None:
        if isinstance(message, Bucket | Receive):
            group = self._groups.find(message.group_name) if isinstance(message, Receive) else None
            self.receiver.miss(message, group, late)

    def _serve(self, call: Call) -> Any:
        body = call.body
        if isinstance(body, Commit):
            return self.receiver.commit(body, call.deadline)
        if isinstance(body, OpenArena):
            return self._open_arena(body, call.deadline)
        if isinstance(body, Bucket):
            self.receiver.stage_end = call.deadline
        if isinstance(body, SetLabel):
            self.receiver.set_label(body, call.deadline)
            return Ack()
        action = self._actions.get(type(body))
        if action is None:
            raise ProtocolError(
                f"not a message about weights: got {type(body).__name__}, expected one of "
                f"{', '.join(sorted(kind.__name__ for kind in (*self._actions, Commit, OpenArena, SetLabel)))}"
            )
        return action(body)

    def _open_arena(self, message: OpenArena, deadline: float) -> ArenaOpened:
        opened = self._open(message.handle, self.receiver.stages.of(message.staging))
        if deadline <= time.monotonic():  # nobody hears its id, so it would stay
            opened.close()
            raise DeadlineExceeded(
                "the arena was opened too late for its caller, and closed again; raise timeout_s"
            )
        return ArenaOpened(arena_id=self.receiver.add_arena(opened))

    def _close_arena(self, message: CloseArena) -> Ack:
        self.receiver.close_arena(message.arena_id)
        return Ack()

    def _join(self, message: JoinGroup) -> "Future[Ack]":
        """Joining waits for other processes: the answer comes later, and other calls go on meanwhile."""
        answer: Future[Ack] = Future()

        def done(joined: "Future[None]") -> None:
            error = joined.exception()
            if error is None:
                answer.set_result(Ack())
            else:
                answer.set_exception(error)

        self._groups.join(message).add_done_callback(done)
        return answer

    def _leave(self, message: LeaveGroup) -> Ack:
        self._groups.leave(message.group_name)
        return Ack()

    def _vote(self, message: Vote) -> Ack:
        self.receiver.prepare(message.session_id, message.epoch).renew(message.lease_s)
        return Ack()

    def _abort(self, message: Abort) -> Ack:
        self.receiver.abort(message.session_id, message.epoch, message.reason)
        return Ack()

    def _open(self, handle: ArenaHandle, stages: StageMemory) -> OpenedArena:
        if isinstance(handle, GroupHandle):
            return OpenedGroupArena(self._groups, handle, stages)
        if isinstance(handle, CudaIpcHandle):
            return OpenedCudaIpcArena(
                handle,
                self._allocations,
                stages,
                in_parts=self.receiver.num_ranks > 1,
            )
        if not isinstance(handle, LocalHandle):
            return self._open_shared_memory(handle, stages)
        buffer = self._lent.pop(handle.key, None)
        if buffer is None or buffer.numel() != handle.num_bytes:
            raise TransportError(
                f"no such buffer was lent: got key {handle.key!r} for {handle.num_bytes} bytes, expected "
                "the key of a buffer of this process; use transport='shared_memory' between processes"
            )
        return OpenedLocalArena(buffer)

    def _open_shared_memory(self, handle: SharedMemoryHandle, stages: StageMemory) -> OpenedArena:
        if needs_upload(self.receiver.device):
            try:
                return OpenedUploadedArena(handle, stages)
            except NoStageMemory as error:
                logger.warning("updates are written out of the host's memory: %s", error)
        return OpenedSharedMemoryArena(handle)
