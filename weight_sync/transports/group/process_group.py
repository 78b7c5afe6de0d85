"""Weights over a process group: the trainer is rank 0, and engine ranks receive what it broadcasts.

An `UpdateGroup` is one member. All that can block runs on a thread of its own, off the caller's: joining, sending and
receiving return futures, which fail with `DeadlineExceeded` or `TransportError` by their deadlines, whatever another
member does. After such an error the group is of no more use, and says so to its peers by closing its connections;
`destroy` it and make a new one, under the same name if you like.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Self, TypeVar

import torch

from ...errors import TransportError
from ...layout.memory import Range
from ...process_groups.calls import CallThread
from ...process_groups.communicator import Communicator
from ...process_groups.expected import telling_bytes
from ...process_groups.joining import (
    BACKENDS,
    Joiner,
    RendezvousPlace,
    check_member,
    connect,
    connect_command,
    gpu_name,
    meet,
    meet_as_engine,
    meet_as_trainer,
)
from ...process_groups.meeting import PROTOCOL_VERSION, GroupTerms
from ...process_groups.parts import cut
from ...process_groups.receiving_process import ReceivingProcess, ReceivingProcesses
from ...process_groups.rendezvous import StoreServer
from ...process_groups.streams import receive_parts, send_parts

T = TypeVar("T")

_NCCL_DEPTH = 16

__all__ = ["BACKENDS", "UpdateGroup"]


class UpdateGroup:
    """One member of an update group. Make it with `serve` (trainer) or `join` (engine rank).

    Calls of a member run in the order in which they are made; all members make them in the same order. A future's
    result is to be awaited before its buffers are used again.
    """

    joined: Future[None]
    """Done when the members are connected (NCCL with a plain trainer: when its rendezvous was found)."""
    master_port: int
    """Where the rendezvous is; the trainer tells it to the engines."""

    def __init__(
        self, member: Joiner, device: torch.device, processes: ReceivingProcesses | None = None
    ) -> None:
        check_member(member, device)
        self.name = member.name
        """What members and errors call the group."""
        self.rank = member.rank
        """0 for the trainer, from 1 for engine ranks."""
        self.world_size = member.world_size
        """Number of members."""
        self.backend = member.backend
        """"gloo" or "nccl"."""
        self.device = device
        """Where buffers are."""
        self._member = dataclasses.replace(member, gpu=gpu_name(device))
        self._server: StoreServer | None = None
        self._place: RendezvousPlace | None = None
        self._offer: GroupTerms | None = None
        self._connection: Communicator | ReceivingProcess | None = None
        self._processes = processes
        self._owns_processes = processes is None
        self._stream: torch.cuda.Stream | None = None
        self._broken: str | None = None
        self._thread = CallThread(
            f"update-group-{self.name}",
            watch=self._lost,
            on_overrun=self._abort,
            on_end=self._release,
        )

    @classmethod
    def serve(
        cls,
        *,
        world_size: int,
        group_name: str,
        host: str = "127.0.0.1",
        port: int = 0,
        backend: str = "gloo",
        device: torch.device | str = "cpu",
        connections: int = 2,
        timeout_s: float = 300.0,
    ) -> Self:
        """Trainer: serve the rendezvous, and return at once; `joined` is done when all engine ranks have come.

        `host` is an address of this machine that every engine can reach; `master_port` is the port to tell them.
        """
        member = Joiner(name=group_name, rank=0, world_size=world_size, backend=backend)
        check_member(member, torch.device(device))
        server = StoreServer(host, port, timeout_s=timeout_s)
        offer = GroupTerms(
            protocol=PROTOCOL_VERSION,
            world_size=world_size,
            backend=backend,
            connections=connections if backend == "gloo" else 1,
        )
        group = cls(member, torch.device(device))
        group._server = server
        group.master_port = server.port
        group.joined = group._submit(
            "joining", timeout_s, lambda end: group._sit_as_trainer(server, offer, end)
        )
        return group

    @classmethod
    def join(
        cls,
        *,
        master_address: str,
        master_port: int | str,
        rank: int,
        world_size: int,
        group_name: str,
        backend: str = "gloo",
        device: torch.device | str = "cpu",
        timeout_s: float = 300.0,
        processes: ReceivingProcesses | None = None,
    ) -> Self:
        """Engine rank: join the group of the trainer at that address, and return at once; see `joined`.

        The trainer may be ours, or any that makes its group as `torch.distributed` trainers do: over gloo, one of
        `processes` is the member then (None: one of the group's own).
        """
        if rank == 0:
            raise TransportError(
                "an engine cannot join as rank 0: got rank 0, expected 1 or more (the trainer is rank 0); check "
                "rank_offset"
            )
        if not str(master_port).isdecimal() or not 0 < int(master_port) < 1 << 16:
            raise TransportError(
                f"cannot join group {group_name!r}: got port {master_port!r}, expected a number from 1 to 65535; pass "
                "the port of the trainer's rendezvous"
            )
        port = int(master_port)
        member = Joiner(name=group_name, rank=rank, world_size=world_size, backend=backend)
        group = cls(member, torch.device(device), processes)
        group.master_port = port
        group.joined = group._submit(
            "joining", timeout_s, lambda end: group._sit_as_engine(master_address, port, end)
        )
        return group

    @property
    def broken(self) -> str | None:
        """Why the group is of no more use, or None."""
        return self._broken

    @property
    def peer_is_ours(self) -> bool:
        """Whether the trainer is an `UpdateGroup` too; known once `joined`."""
        return self._offer is not None

    def broadcast(
        self,
        buffer: torch.Tensor,
        spans: Sequence[Range] | None = None,
        *,
        timeout_s: float,
    ) -> Future[None]:
        """Trainer: send the `spans` of a uint8 `buffer` (None: all of it, in parts of 64 MiB)."""
        parts = cut(buffer, spans)
        return self._submit(
            f"a broadcast of {sum(part.numel() for part in parts)} bytes",
            timeout_s,
            lambda end: send_parts(self._in_step(end), parts, depth=self._depth, end=end),
        )

    def landing(self, num_bytes: int) -> torch.Tensor | None:
        """Memory to receive into from a plain trainer, uint8 (see `ReceivingProcess`); None where any memory will do.

        What was in it may be gone. `torch.OutOfMemoryError` when there is none.
        """
        connection = self._connection
        return connection.landing(num_bytes) if isinstance(connection, ReceivingProcess) else None

    def receive_into(
        self,
        buffer: torch.Tensor,
        spans: Sequence[Range] | None = None,
        *,
        timeout_s: float,
        telling: Sequence[int] | None = None,
    ) -> Future[None]:
        """Engine rank: fill the `spans` of a uint8 `buffer` with what the trainer broadcasts, one part each.

        The spans must be as long as the trainer's, and share no bytes. None is what `broadcast` makes of None if the
        trainer is ours, and the whole buffer in one part if it is not. A plain trainer's parts over gloo must come into
        a buffer of `landing`; one of another length than announced is an error then, on all members alike. `telling`:
        how many bytes at the end of each span tell that they never came (see `telling_bytes`), None where any might.
        """
        whole = [(0, buffer.numel())]

        def receive(end: float) -> None:
            connection = self._connected(end)
            known = spans if spans is not None or self.peer_is_ours else whole
            parts = cut(buffer, known)
            if isinstance(connection, Communicator):
                receive_parts(connection, parts, depth=self._depth, end=end)
                return
            assert known is not None
            tells = [telling_bytes(torch.uint8)] * len(known) if telling is None else telling
            connection.receive(buffer, known, telling=tells, end=end)

        return self._submit(f"a receive of {buffer.numel()} bytes", timeout_s, receive)

    def destroy(self, *, wait_s: float = 1.0) -> None:
        """Leave the group: what is under way fails at once, and peers that wait for this member fail too.

        Blocks at most `wait_s`. Connections that an operation still uses are closed when it ends, by its deadline at
        the latest. Safe to repeat, from any thread.
        """
        self._broken = self._broken or "it was destroyed"
        self._abort()
        self._thread.close(wait_s=wait_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.destroy()

    @property
    def _depth(self) -> int:
        """Parts that are under way at once. NCCL has them one after another, and must not wait for the next one."""
        if self.backend == "nccl":
            return _NCCL_DEPTH
        return 2 * (self._offer.connections if self._offer is not None else 1)

    def _submit(self, what: str, timeout_s: float, call: Callable[[float], T]) -> Future[T]:
        end = time.monotonic() + timeout_s
        cuda = self.device.type == "cuda"
        # What the caller has put on its stream so far comes first.
        before = torch.cuda.current_stream(self.device).record_event() if cuda else None

        def guarded() -> T:
            if self._broken is not None:
                raise TransportError(
                    f"{self._member}: got a call after it broke ({self._broken}), expected none; destroy it and make a "
                    "new one"
                )
            try:
                with self._on_device(before):
                    return call(end)
            except BaseException as error:
                self._break(error)
                raise

        return self._thread.submit(guarded, timeout_s=timeout_s, what=f"{self._member}: {what}")

    def _sit_as_trainer(self, server: StoreServer, offer: GroupTerms, end: float) -> None:
        self._place = meet_as_trainer(
            self._member, server, offer, end=end, abandoned=self._is_abandoned
        )
        self._connected(end)

    def _sit_as_engine(self, host: str, port: int, end: float) -> None:
        self._place = meet_as_engine(
            self._member, host, port, end=end, abandoned=self._is_abandoned
        )
        if self._place.meeting is not None:
            self._connected(end)

    def _connected(self, end: float) -> Communicator | ReceivingProcess:
        """This member's end, made when it is first needed."""
        if self._connection is None:
            assert self._place is not None, "joining comes first, and a failed one breaks the group"
            meeting = self._place.meeting or meet(
                self._member, self._place.store, end=end, abandoned=self._is_abandoned
            )
            assert meeting is not None
            self._offer = meeting.offer
            if self._offer is None and self.backend == "gloo":
                processes = self._processes = self._processes or ReceivingProcesses()
                process = processes.start(self.name, rank=self.rank, size=self.world_size)
                self._connection = process  # `destroy` ends it while it waits for the others
                process.connect(connect_command(self._member, self._place, meeting, end=end))
                return process
            communicator = connect(self._member, self._place, meeting, end=end)
            self._connection = communicator
            if self.backend == "nccl" and self._offer is not None:
                # NCCL connects in its first operation; here a member that cannot still fails the joining.
                first = torch.zeros(1, dtype=torch.uint8, device=self.device)
                communicator.post_broadcast(first, root=0, timeout_s=end - time.monotonic()).wait()
        return self._connection

    def _in_step(self, end: float) -> Communicator:
        """This member's end where both ends know what comes."""
        connected = self._connected(end)
        assert isinstance(connected, Communicator)
        return connected

    def _is_abandoned(self) -> bool:
        return self._thread.over

    @contextmanager
    def _on_device(self, before: torch.cuda.Event | None) -> Iterator[None]:
        """On CUDA, operations run on a stream of the group's own, beside the engine's."""
        if before is None:
            yield
            return
        with torch.cuda.device(self.device):
            self._stream = self._stream or torch.cuda.Stream()
            self._stream.wait_event(before)
            with torch.cuda.stream(self._stream):
                yield

    def _break(self, error: BaseException) -> None:
        """On the group's thread: peers learn of the failure from their closed connections."""
        self._broken = self._broken or f"{type(error).__name__}: {error}"
        self._release()

    def _lost(self) -> str | None:
        """Why the trainer is known to be gone. gloo does not always tell members that wait for a message from it."""
        place = self._place
        return place.lifeline.lost() if place is not None and place.lifeline is not None else None

    def _abort(self) -> None:
        """From any thread: free the group's thread where the backend can."""
        connection = self._connection
        if connection is not None:
            connection.abort()

    def _release(self) -> None:
        """On the group's thread: close the connections, and the rendezvous with them."""
        if self._connection is not None:
            self._connection.close()
        if self._processes is not None and self._owns_processes:
            self._processes.close()
        if self._server is not None:
            self._server.close()
        if self._place is not None and self._place.lifeline is not None:
            self._place.lifeline.close()
        self._connection = self._place = self._server = None
