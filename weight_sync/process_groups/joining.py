"""From an address to a communicator, for both halves of an update group."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from torch.distributed import Store

from ..errors import SyncError
from .backends import open_gloo, open_nccl
from .communicator import Communicator
from .meeting import Meeting, Offer, attend, convene, find_offer, find_plain, report_failure
from .rendezvous import Lifeline, StoreServer, connect_store, first_line, left, poll, under

_OFFER_GRACE_S = 1.0
"""How long a trainer of ours may take from serving its store to making its offer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """Who joins what."""

    name: str
    """Name of the group."""
    rank: int
    """This member's position; the trainer is 0."""
    world_size: int
    """Number of members."""
    backend: str
    """"gloo" or "nccl"."""

    def __str__(self) -> str:
        return f"update group {self.name!r}, rank {self.rank} of {self.world_size}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """A member's place at the rendezvous."""

    store: Store
    """Its connection to the store."""
    address: str
    """Where the others reach this machine."""
    lifeline: Lifeline | None
    """Shows when the trainer is gone; None in the trainer."""
    meeting: Meeting | None
    """Where the members connect; None while a plain trainer has not shown it (NCCL: until its first broadcast)."""


def sit_as_trainer(
    member: Member,
    server: StoreServer,
    offer: Offer,
    *,
    end: float,
    abandoned: Callable[[], bool],
) -> Seat:
    """Wait for all engine ranks at the store that this process serves."""
    meeting = convene(server.store, member.name, offer, end=end, abandoned=abandoned)
    return Seat(store=server.store, address=server.host, lifeline=None, meeting=meeting)


def sit_as_engine(
    member: Member, host: str, port: int, *, end: float, abandoned: Callable[[], bool]
) -> Seat:
    """Find the trainer's store, and in it the trainer's way of making the group; wait for the others if it is ours."""
    store, lifeline = connect_store(
        host, port, world_size=member.world_size, end=end, abandoned=abandoned
    )
    patience = end
    if member.backend == "nccl":
        patience = min(end, time.monotonic() + _OFFER_GRACE_S)
    meeting = find_meeting(
        member, store, end=patience, abandoned=abandoned, required=patience == end
    )
    if meeting is not None and meeting.offer is not None:
        attend(store, member.name, member.rank, end=end, abandoned=abandoned)
    return Seat(store=store, address=lifeline.address, lifeline=lifeline, meeting=meeting)


def find_meeting(
    member: Member,
    store: Store,
    *,
    end: float,
    abandoned: Callable[[], bool],
    required: bool = True,
) -> Meeting | None:
    """How the trainer makes the group. Not shown by `end`: `DeadlineExceeded`, or None if it is not `required`."""

    def find() -> Meeting | bool | None:
        try:
            offered = find_offer(store, member.name, member.world_size, member.backend)
        except SyncError as error:
            report_failure(store, member.name, member.rank, first_line(error))
            raise
        found = offered or find_plain(store, member.name, member.backend)
        return found or (None if required or time.monotonic() < end else False)

    meeting = poll(
        find,
        end=end,
        abandoned=abandoned,
        late=lambda: (
            f"{member}: got a rendezvous without a group of that name by the deadline, expected the trainer to make "
            "one; check that it uses the same group name and backend"
        ),
    )
    return meeting if isinstance(meeting, Meeting) else None


def connect(member: Member, seat: Seat, meeting: Meeting, *, end: float) -> Communicator:
    """The communicator. gloo's is returned when all members are connected, NCCL connects when it is first used."""
    store = under(seat.store, meeting.prefix)
    left_s = left(end).total_seconds()
    if member.backend == "nccl":
        return open_nccl(
            store, rank=member.rank, size=member.world_size, name=member.name, timeout_s=left_s
        )
    return open_gloo(
        store,
        rank=member.rank,
        size=member.world_size,
        name=member.name,
        address=seat.address,
        connections=meeting.offer.connections if meeting.offer is not None else 1,
        join_timeout_s=left_s,
        timeout_s=left_s,
    )
