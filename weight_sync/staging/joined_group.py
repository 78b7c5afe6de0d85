"""An engine rank's end of an update group: it joins the trainer's, and receives what the trainer broadcasts."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Self

import torch

from ..errors import TransportError
from ..layout.memory import Range
from ..process_groups.communicator import Communicator
from ..process_groups.expected import telling_bytes
from ..process_groups.joining import Joiner, connect, meet, meet_as_engine
from ..process_groups.parts import cut
from ..process_groups.receiving_process import (
    ReceivingProcess,
    ReceivingProcesses,
    connect_command,
)
from ..process_groups.streams import broadcast_parts
from ..transports.update_group import UpdateGroup


class JoinedGroup(UpdateGroup[Communicator | ReceivingProcess]):
    """A rank from 1 on; made with `join`."""

    def __init__(
        self, member: Joiner, device: torch.device, processes: ReceivingProcesses | None = None
    ) -> None:
        super().__init__(member, device)
        self._processes = processes
        self._owns_processes = processes is None

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
        """Join the group of the trainer at that address, and return at once; see `joined`.

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
    def peer_is_ours(self) -> bool:
        """Whether the trainer is ours too; known once `joined`."""
        return self._offer is not None

    @property
    def orphaned(self) -> bool:
        """Its trainer has died while nothing was under way, which nobody was told. A plain one over NCCL may live on
        without its rendezvous."""
        watched = self.peer_is_ours or self.backend == "gloo"
        idle = self._broken is None and self._thread.idle
        return idle and watched and self._lost() is not None

    def landing(self, num_bytes: int) -> torch.Tensor | None:
        """Memory to receive into from a plain trainer, uint8 (see `ReceivingProcess`); None where any memory will do.

        What was in it may be gone. `torch.OutOfMemoryError` when there is none.
        """
        connection = self._connection
        return connection.landing(num_bytes) if isinstance(connection, ReceivingProcess) else None

    def receive_into(
        self,
        buffer: torch.Tensor,
        ranges: Sequence[Range] | None = None,
        *,
        timeout_s: float,
        telling: Sequence[int] | None = None,
    ) -> Future[None]:
        """Fill the `ranges` of a uint8 `buffer` with what the trainer broadcasts, one part each.

        The ranges must be as long as the trainer's, and share no bytes. None is what `broadcast` makes of None if the
        trainer is ours, and the whole buffer in one part if it is not. A plain trainer's parts over gloo must come into
        a buffer of `landing`; one of another length than announced is an error then, on all members alike. `telling`:
        how many bytes at the end of each range tell that they never came (see `telling_bytes`), None where any might.
        """
        whole = [(0, buffer.numel())]

        def receive(end: float) -> None:
            connection = self._connected(end)
            known = ranges if ranges is not None or self.peer_is_ours else whole
            parts = cut(buffer, known)
            if isinstance(connection, Communicator):
                broadcast_parts(connection, parts, depth=self._depth, end=end)
                return
            assert known is not None
            tells = [telling_bytes(torch.uint8)] * len(known) if telling is None else telling
            connection.receive(buffer, known, telling=tells, end=end)

        return self._submit(f"a receive of {buffer.numel()} bytes", timeout_s, receive)

    def _sit_as_engine(self, host: str, port: int, end: float) -> None:
        self._place = meet_as_engine(
            self._member, host, port, end=end, abandoned=self._is_abandoned
        )
        if self._place.meeting is not None:
            self._connected(end)

    def _connected(self, end: float) -> Communicator | ReceivingProcess:
        """This member's end, made when it is first needed."""
        if self._connection is None:
            place = self._place
            assert place is not None, "joining comes first, and a failed one breaks the group"
            meeting = place.meeting or meet(
                self._member, place.store, end=end, abandoned=self._is_abandoned
            )
            assert meeting is not None
            self._offer = meeting.offer
            if self._offer is None and self.backend == "gloo":
                processes = self._processes = self._processes or ReceivingProcesses()
                process = processes.start(self.name, rank=self.rank, size=self.world_size)
                self._connection = process  # `destroy` ends it while it waits for the others
                process.connect(connect_command(self._member, place, meeting, end=end))
                return process
            communicator = self._connection = connect(self._member, place, meeting, end=end)
            self._connect_nccl(communicator, end)
        return self._connection

    def _release(self) -> None:
        super()._release()
        if self._processes is not None and self._owns_processes:
            self._processes.close()
