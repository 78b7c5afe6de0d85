"""The trainer's end of an update group: it serves the rendezvous, and broadcasts."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Self

import torch

from ..layout.memory import Range
from ..process_groups.communicator import Communicator
from ..process_groups.joining import Joiner, check_member, connect, meet_as_trainer
from ..process_groups.meeting import PROTOCOL_VERSION, GroupTerms
from ..process_groups.parts import cut
from ..process_groups.rendezvous import StoreServer
from ..process_groups.streams import broadcast_parts
from .update_group import UpdateGroup


class TrainerGroup(UpdateGroup[Communicator]):
    """Rank 0; made with `serve`."""

    _server: StoreServer | None = None

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
        """Serve the rendezvous, and return at once; `joined` is done when all engine ranks have come.

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

    def broadcast(
        self,
        buffer: torch.Tensor,
        ranges: Sequence[Range] | None = None,
        *,
        timeout_s: float,
    ) -> Future[None]:
        """Send the `ranges` of a uint8 `buffer` (None: all of it, in parts of 64 MiB)."""
        parts = cut(buffer, ranges)
        return self._submit(
            f"a broadcast of {sum(part.numel() for part in parts)} bytes",
            timeout_s,
            lambda end: broadcast_parts(self._connected(end), parts, depth=self._depth, end=end),
        )

    def _sit_as_trainer(self, server: StoreServer, offer: GroupTerms, end: float) -> None:
        self._place = meet_as_trainer(
            self._member, server, offer, end=end, abandoned=self._is_abandoned
        )
        self._connected(end)

    def _connected(self, end: float) -> Communicator:
        """This member's end, made when it is first needed."""
        if self._connection is None:
            place = self._place
            assert place is not None and place.meeting is not None, (
                "joining comes first, and a failed one breaks the group"
            )
            self._offer = place.meeting.offer
            self._connection = connect(self._member, place, place.meeting, end=end)
            self._connect_nccl(self._connection, end)
        return self._connection

    def _release(self) -> None:
        super()._release()
        if self._server is not None:
            self._server.close()
            self._server = None
