"""A trainer's standing with one engine: the connection, what the engine said of itself, and the arena it has opened."""

import contextlib
import logging
import secrets
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, Literal

import numpy as np
import torch

from ..devices.room import can_spare
from ..errors import EngineRestartedError, ManifestMismatch, SyncError, TransportError
from ..joint.engines import JointTarget, Target, check_target
from ..layout.encoding import FULL, Encoding
from ..layout.fingerprints import ArenaFingerprints
from ..layout.finite import FiniteCheck
from ..transports.arena import Arena
from ..transports.cuda_ipc import CudaIpcArena
from ..transports.group_arena import GroupArena
from ..transports.ipc_memory import ipc_memory_of
from ..transports.local import LocalArena
from ..transports.shared_memory import SharedMemoryArena
from ..transports.trainer_group import TrainerGroup
from ..wire.channel import Channel, RpcChannel
from ..wire.deadline import Deadline
from ..wire.futures import answer, when_all_are_done
from ..wire.messages import (
    ArenaOpened,
    CloseArena,
    EngineInfo,
    GetIgnored,
    Hello,
    IgnoredReply,
    JoinGroup,
    LeaveGroup,
    OpenArena,
    Staging,
)
from ..wire.process import Home, host_id
from .open_session import EngineArena
from .packer import DevicePacker
from .selection import Layout, Selector
from .window import Window, half_bytes

logger = logging.getLogger(__name__)

TransportChoice = Literal["auto", "local", "shared_memory", "cuda_ipc", "process_group"]
GroupBackend = Literal["auto", "gloo", "nccl"]
_CLOSE_PATIENCE_S = 3600.0
"""How late a good-bye is heard, should the engine read it late."""
_ANSWER_GRACE_S = 5.0
"""How much later than its caller gives up the engine may say that it has opened an arena: it is told to close it."""


class PackedArena(EngineArena):
    """An arena that an engine has opened, with everything about it that is worked out once."""

    def __init__(self, arena: Arena, arena_id: int, layout: Layout, transport: str) -> None:
        super().__init__(layout, arena_id, transport)
        self.arena = arena
        self.buffer = arena.buffer[: layout.carried.arena_bytes]
        is_window = arena.buffer.numel() < layout.carried.arena_bytes
        self.window = Window(layout.carried, arena.buffer) if is_window else None
        """What fills it, where it holds less than the model; then there are no views."""
        self.views = [] if is_window else layout.carried.views(self.buffer)
        metas = layout.carried.tensors
        self.num_bytes = np.array([meta.num_bytes for meta in metas], dtype=np.int64)
        self.fingerprints = ArenaFingerprints(layout.carried)
        self.finite = FiniteCheck(layout.carried)
        self.packer: DevicePacker | None = None
        """What packs into it, where it is on a GPU."""
        assert layout.encoding.verbatim or not (is_window or self.buffer.is_cuda), "packed as it is"
        if self.buffer.is_cuda and self.window is None:
            self.packer = DevicePacker(layout.carried, self.buffer, self.fingerprints)

    def packed_view(self, row: int) -> torch.Tensor:
        """What was packed for a row, to compare a tied tensor with it."""
        if self.window is not None or not self.layout.encoding.verbatim:
            raise ManifestMismatch(
                f"{self.layout.manifest.tensors[row].name}: got a tied tensor apart from its twin, which this arena "
                "does not hold any more (arena_bytes); send one of them, or both in one list"
            )
        return self.views[row]

    @property
    def seen(self) -> bool:
        """The engine reads the arena itself: nothing has to be carried."""
        return self.transport != "process_group"

    def close(self) -> None:
        """Give the memory back."""
        self.views.clear()
        self.packer = self.window = None
        self.buffer = torch.empty(0, dtype=torch.uint8)
        self.arena.close()


class EngineEndpoint:
    """Connects when it is first used, and anew when the engine behind it has died. Not thread safe."""

    def __init__(
        self,
        target: Target | Sequence[Target],
        *,
        bucket_bytes: int,
        transport: TransportChoice,
        group_host: str = "127.0.0.1",
        group_backend: GroupBackend = "auto",
        gpu: int | None = None,
        arena_bytes: int | None = None,
        staging: Staging = "extra",
        encoding: Encoding = FULL,
    ) -> None:
        """`gpu`: the one that NCCL sends from; None: the calling thread's current one. `arena_bytes`: see
        `WeightPublisher`."""
        self._arena_bytes = arena_bytes
        self._staging = staging
        self._target: Target
        if isinstance(target, Sequence) and not isinstance(target, str):
            self._target = JointTarget(target)
        else:
            self._target = check_target(target)
        self._bucket_bytes = bucket_bytes
        self._encoding = encoding
        self._transport = transport
        self._group_host = group_host
        self._group_backend = group_backend
        self._gpu = current_gpu() if gpu is None else gpu
        self._channel: Channel | None = None
        self._home = Home("the publisher")
        self._info: EngineInfo | None = None
        self._engine_id = ""
        self._packed: PackedArena | None = None
        self._closing: list[Future[Any]] = []
        """Of arenas on a GPU that an engine has not let go of yet, as far as is known."""
        self._ignored: dict[str, bool] = {}
        self._served: tuple[str, int] | None = None
        """Which engine committed which version for this publisher last."""

    def channel(self) -> Channel:
        """The connection; a new one when there is none or its engine is dead."""
        if self._channel is not None and self._channel.dead is None:
            return self._channel
        if self._channel is not None:
            self._channel.close()
            self._info = None
        if isinstance(self._target, str):
            self._channel = RpcChannel.connect(self._target)
        else:
            self._channel = self._target.weight_channel()
        return self._channel

    def hello(self, deadline: Deadline) -> EngineInfo:
        """Ask the engine who it is; another one than before needs its own arena."""
        info: EngineInfo = deadline.call(self.channel(), Hello())
        if info.engine_id != self._engine_id:
            self.drop_arena()
            self._ignored.clear()
        self._info, self._engine_id = info, info.engine_id
        return info

    def note_commit(self, version: int) -> None:
        """The engine that is connected now serves `version`, which came from here."""
        if self._info is not None:
            self._served = (self._info.engine_id, version)

    def check_same(self, *, strict: bool) -> None:
        """Notice an engine that has taken the place of the one that was published to, and has only loaded weights.

        A complete update (`strict`) is what it needs; parts of one would make a mixture: `EngineRestartedError`.
        """
        info = self._info
        if self._served is None or info is None or info.engine_id == self._served[0]:
            return
        _, version = self._served
        if info.version >= version or info.torn is not None:
            return
        what = (
            f"the engine (process {info.process.pid}) is not the one that committed version {version} of this "
            f"publisher: it was started anew and serves version {info.version} ({info.label})"
        )
        if not strict:
            raise EngineRestartedError(
                f"{what}; expected the same one for a part; publish all tensors"
            )
        logger.warning("%s; it gets this complete update", what)

    def arena(self, deadline: Deadline) -> PackedArena:
        """The arena with the engine's layout, opened over there."""
        channel = self.channel()
        info = self._info if self._info is not None else self.hello(deadline)
        if self._packed is not None and self._packed.arena.broken is not None:
            self.drop_arena()
        if self._packed is None:
            if self._transport == "process_group":
                info = self.hello(deadline)  # Ranks come and go where there are many engines.
            layout = Layout(info, self._bucket_bytes, self._encoding)
            if self._transport == "process_group":
                self._packed = self._make_group(channel, info, layout, deadline)
            else:
                self._packed = self._make(channel, layout, deadline)
        return self._packed

    def selector(self, packed: PackedArena, deadline: Deadline, *, cast: bool) -> Selector:
        """What sorts one session's tensors into rows of the arena."""
        return Selector(
            packed.layout,
            cast=cast,
            packed=packed.packed_view,
            ignored=lambda names: self._ask_ignored(names, deadline),
        )

    def drop_arena(self, wait_s: float | None = None) -> "Future[Any] | None":
        """Never write into the arena again: the engine may still read it. It is told to close it, and has done so for
        certain only after an answer within `wait_s`. Returns what the engine's answer comes to, if it is to come."""
        packed, self._packed = self._packed, None
        if packed is None:
            return None
        closed: Future[Any] | None = None
        if self._channel is not None and self._channel.dead is None:
            # A session over it ends with it. It is closed in any case when this process closes its end, or ends.
            with contextlib.suppress(SyncError, TimeoutError):
                closed = self._channel.submit(
                    CloseArena(arena_id=packed.arena_id), _CLOSE_PATIENCE_S
                )
                if wait_s is not None:
                    closed.result(wait_s)
        if closed is not None and isinstance(packed.arena, CudaIpcArena):
            # Its memory goes when the engine has let go of it, or is not there any more.
            closed.add_done_callback(lambda _: packed.close())
            self._note(closed)
        else:
            packed.close()
        return closed

    def _note(self, closed: "Future[Any]") -> None:
        """An engine is told to let go of an arena; `closed` ends when it has."""
        self._closing = [one for one in (*self._closing, closed) if not one.done()]

    def close(self) -> None:
        """Give the arena and the connection back; that stays until an engine that is busy has let go of GPU memory."""
        self.drop_arena(wait_s=1.0)
        if self._channel is not None and all(closed.done() for closed in self._closing):
            self._channel.close()
            self._channel = None
        else:
            self.let_go()

    def let_go(self) -> None:
        """`close` for an owner that was collected: on whatever thread, and waiting for nothing."""
        if not self._home.here:
            return
        closed = self.drop_arena()
        channel, self._channel = self._channel, None
        if channel is not None:
            closing = {*self._closing, *([] if closed is None else [closed])}
            when_all_are_done(closing, lambda: channel.close(wait=False))

    def _make(self, channel: Channel, layout: Layout, deadline: Deadline) -> PackedArena:
        assert self._info is not None, "it has said hello"
        num_bytes = layout.carried.arena_bytes
        if self._transport == "cuda_ipc":
            return self._make_cuda_ipc(channel, layout, deadline)
        local = channel.is_local if self._transport == "auto" else self._transport == "local"
        if local and not channel.is_local:
            raise TransportError(
                "cannot lend a buffer: got transport='local' and an engine in another process, expected one in this; "
                "use 'auto' or 'shared_memory'"
            )
        if local:
            lent = self._local_arena(num_bytes, torch.device(self._info.device))
            lent.key = channel.lend(lent.buffer)
            return self._open(channel, lent, layout, "local", deadline)
        if self._transport == "auto" and self._may_share_gpu_memory(self._info):
            try:
                return self._make_cuda_ipc(channel, layout, deadline)
            except TransportError as error:
                logger.warning("weights go through shared memory: %s", error)
        gpu = _gpu(self._gpu) if torch.cuda.is_initialized() else None
        arena = SharedMemoryArena(num_bytes, gpu)
        return self._open(channel, arena, layout, "shared_memory", deadline)

    def _make_cuda_ipc(self, channel: Channel, layout: Layout, deadline: Deadline) -> PackedArena:
        if channel.is_local:
            raise TransportError(
                "cannot open memory of this process itself: got transport='cuda_ipc' and an engine in this process, "
                "expected one in another; use 'auto' or 'local'"
            )
        gpu = _gpu(self._gpu)
        num_bytes = whole = layout.carried.arena_bytes
        if self._arena_bytes is not None and self._arena_bytes < whole:
            num_bytes = 2 * half_bytes(layout.carried, self._arena_bytes)
        if self._transport == "auto" and not can_spare(gpu, num_bytes):
            raise TransportError(
                f"{gpu} has no {num_bytes} bytes to spare for an arena: got fewer free, expected that and some more; "
                "transport='cuda_ipc' takes the last ones"
            )
        arena = CudaIpcArena(num_bytes, ipc_memory_of(gpu), is_window=num_bytes < whole)
        return self._open(channel, arena, layout, "cuda_ipc", deadline)

    def _local_arena(self, num_bytes: int, device: torch.device) -> LocalArena:
        if self._transport == "auto" and not can_spare(device, num_bytes):
            logger.warning(
                "weights go through memory of the CPU: %s has no %d bytes to spare",
                device,
                num_bytes,
            )
            return LocalArena(num_bytes)
        return LocalArena(num_bytes, device)

    @staticmethod
    def _may_share_gpu_memory(info: EngineInfo) -> bool:
        """This process works on a GPU, and so does the engine, on the same machine."""
        return (
            torch.cuda.is_initialized()
            and info.device.startswith("cuda")
            and "cuda_ipc" in info.transports
            and bool(info.process.host)
            and info.process.host == host_id()
        )

    def _open(
        self, channel: Channel, arena: Arena, layout: Layout, transport: str, deadline: Deadline
    ) -> PackedArena:
        """Have the engine open it. When that fails here, it is closed, at both ends."""
        future: Future[ArenaOpened] | None = None
        try:
            message = OpenArena(handle=arena.handle, staging=self._staging)
            left_s = deadline.left_s("open the arena")
            future = channel.submit(message, left_s + _ANSWER_GRACE_S)
            opened: ArenaOpened = deadline.wait(future, "OpenArena")
        except BaseException:
            if future is None:
                arena.close()
            else:
                closed: Future[Any] = Future()
                self._note(closed)
                future.add_done_callback(lambda late: _close_late(channel, arena, late, closed))
            raise
        return PackedArena(arena, opened.arena_id, layout, transport)

    def _make_group(
        self, channel: Channel, info: EngineInfo, layout: Layout, deadline: Deadline
    ) -> PackedArena:
        """Serve a group, have all engine ranks join it, and a stage on each of them."""
        backend = self._group_backend
        if backend == "auto":
            backend = "nccl" if info.device.startswith("cuda") else "gloo"
        group = TrainerGroup.serve(
            world_size=1 + info.tp_size,
            group_name=f"publisher-{secrets.token_hex(6)}",
            host=self._group_host,
            backend=backend,
            device=_gpu(self._gpu) if backend == "nccl" else "cpu",
            timeout_s=deadline.left_s("join the group"),
        )
        try:
            join = JoinGroup(
                group_name=group.name,
                master_address=self._group_host,
                master_port=group.master_port,
                rank_offset=1,
                world_size=group.world_size,
                backend=backend,
                timeout_s=deadline.left_s("join the group"),
            )
            deadline.call(channel, join)
            deadline.wait(group.joined, "join the group")
            arena = GroupArena(layout.carried.arena_bytes, group)
            return self._open(channel, arena, layout, "process_group", deadline)
        except BaseException:
            if channel.dead is None:  # ranks that have joined need not stay
                with contextlib.suppress(SyncError):
                    channel.submit(LeaveGroup(group_name=group.name), _CLOSE_PATIENCE_S)
            group.destroy()
            raise

    def _ask_ignored(self, names: list[str], deadline: Deadline) -> frozenset[str]:
        new = tuple(name for name in names if name not in self._ignored and _can_be_asked(name))
        if new:
            reply: IgnoredReply = deadline.call(self.channel(), GetIgnored(names=new))
            ignored = set(reply.names)
            self._ignored.update({name: name in ignored for name in new})
        return frozenset(name for name in names if self._ignored.get(name, False))


def _close_late(
    channel: Channel, arena: Arena, opened: "Future[ArenaOpened]", closed: "Future[Any]"
) -> None:
    """Nobody waits any more for what the engine says to an arena: close it at both ends, over there first, and end
    `closed`."""

    def close(_: object = None) -> None:
        arena.close()
        answer(closed, None)

    over_there: Future[Any] | None = None
    if opened.exception() is None and channel.dead is None:
        with contextlib.suppress(SyncError):
            message = CloseArena(arena_id=opened.result().arena_id)
            over_there = channel.submit(message, _CLOSE_PATIENCE_S)
    if over_there is None:
        close()
    else:
        over_there.add_done_callback(close)


def _can_be_asked(name: str) -> bool:
    """Whether a message carries the name; others are no engine's."""
    try:
        return len(name.encode()) <= 512
    except UnicodeEncodeError:  # half of a surrogate pair
        return False


def current_gpu() -> int:
    """Number of the calling thread's CUDA device. Each thread has its own, so ask on the trainer's."""
    return torch.cuda.current_device() if torch.cuda.is_initialized() else 0


def _gpu(number: int) -> torch.device:
    """That GPU, where there are any."""
    if not torch.cuda.is_available():
        raise TransportError(
            "cannot send from a GPU: got a process without one, expected one, as the engine has; use "
            "group_backend='gloo', or transport='shared_memory' on the engine's machine"
        )
    return torch.device("cuda", number)
