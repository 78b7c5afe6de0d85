"""From an address to a communicator, for both halves of an update group."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed import Store

from ..errors import SyncError, TransportError
from ..time_left import left_s
from .backends import open_gloo, open_nccl
from .communicator import Communicator
from .meeting import GroupTerms, Meeting, attend, convene, find_plain, find_terms, report_failure
from .rendezvous import Lifeline, StoreServer, connect_store, first_line, poll, under

BACKENDS = ("gloo", "nccl")
_OFFER_GRACE_S = 1.0
"""How long a trainer of ours may take from serving its store to making its offer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Joiner:
    """Who joins what."""

    name: str
    """Name of the group."""
    rank: int
    """This member's position; the trainer is 0."""
    world_size: int
    """Number of members."""
    backend: str
    """"gloo" or "nccl"."""
    gpu: str = ""
    """Name of the GPU that its buffers are on, the same in every process; empty on the CPU."""

    def __str__(self) -> str:
        return f"update group {self.name!r}, rank {self.rank} of {self.world_size}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RendezvousPlace:
    """A member's place at the rendezvous."""

    store: Store
    """Its connection to the store."""
    address: str
    """Where the others reach this machine."""
    lifeline: Lifeline | None
    """Shows when the trainer is gone; None in the trainer."""
    meeting: Meeting | None
    """Where the members connect; None while a plain trainer has not shown it (NCCL: until its first broadcast)."""


def check_member(member: Joiner, device: torch.device) -> None:
    """`TransportError` for what cannot be a member of any group."""
    if member.backend not in BACKENDS:
        raise TransportError(
            f"cannot make an update group: got backend {member.backend!r}, expected one of {', '.join(BACKENDS)}; use "
            "gloo on a CPU and nccl on CUDA"
        )
    if member.backend == "nccl" and device.type != "cuda":
        raise TransportError(
            f"cannot make an update group: got backend 'nccl' and device {str(device)!r}, expected a CUDA device; "
            "use gloo for buffers on the CPU"
        )
    if member.backend == "nccl" and not (dist.is_nccl_available() and torch.cuda.is_available()):
        raise TransportError(
            "cannot make an update group: got backend 'nccl' on a machine without a GPU that this torch build can use, "
            "expected 'gloo'; use gloo, or install a CUDA build of torch"
        )
    if not member.name or not 0 <= member.rank < member.world_size:
        raise TransportError(
            f"cannot make an update group: got name {member.name!r}, rank {member.rank} and world size "
            f"{member.world_size}, expected a name and a rank below the world size; count the trainer and each rank of "
            "every engine"
        )


def gpu_name(device: torch.device) -> str:
    """What `Joiner.gpu` is for buffers on `device`."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""


def meet_as_trainer(
    member: Joiner,
    server: StoreServer,
    offer: GroupTerms,
    *,
    end: float,
    abandoned: Callable[[], bool],
) -> RendezvousPlace:
    """Wait for all engine ranks at the store that this process serves."""
    meeting = convene(
        server.store, member.name, offer, gpu=member.gpu, end=end, abandoned=abandoned
    )
    return RendezvousPlace(store=server.store, address=server.host, lifeline=None, meeting=meeting)


def meet_as_engine(
    member: Joiner, host: str, port: int, *, end: float, abandoned: Callable[[], bool]
) -> RendezvousPlace:
    """Find the trainer's store, and in it the trainer's way of making the group; wait for the others if it is ours."""
    store, lifeline = connect_store(
        host, port, world_size=member.world_size, end=end, abandoned=abandoned
    )
    try:
        if member.backend == "nccl":
            # A plain trainer shows nothing before its first broadcast.
            patience = min(end, time.monotonic() + _OFFER_GRACE_S)
            meeting = meet(member, store, end=end, patience=patience, abandoned=abandoned)
        else:
            meeting = meet(member, store, end=end, abandoned=abandoned)
    except BaseException:
        lifeline.close()
        raise
    return RendezvousPlace(
        store=store, address=lifeline.address, lifeline=lifeline, meeting=meeting
    )


def meet(
    member: Joiner,
    store: Store,
    *,
    end: float,
    abandoned: Callable[[], bool],
    patience: float | None = None,
) -> Meeting | None:
    """How the trainer makes the group; all members have come if it is ours.

    When it has shown nothing by `end`, `DeadlineExceeded`; when it has shown nothing by `patience`, None.
    """

    def find() -> Meeting | bool | None:
        try:
            offered = find_terms(store, member.name, member.world_size, member.backend)
        except SyncError as error:
            report_failure(store, member.name, member.rank, first_line(error))
            raise
        found = offered or find_plain(store, member.name, member.backend)
        return found or (False if patience is not None and time.monotonic() >= patience else None)

    meeting = poll(
        find,
        end=end,
        abandoned=abandoned,
        late=lambda: (
            f"{member}: got a rendezvous without a group of that name by the deadline, expected the trainer to make "
            "one; check that it uses the same group name and backend"
        ),
    )
    if not isinstance(meeting, Meeting):
        return None
    if meeting.offer is not None:
        attend(store, member.name, member.rank, gpu=member.gpu, end=end, abandoned=abandoned)
    return meeting


def connect(
    member: Joiner, place: RendezvousPlace, meeting: Meeting, *, end: float
) -> Communicator:
    """The communicator. gloo's is returned when all members are connected, NCCL connects when it is first used."""
    store = under(place.store, meeting.prefix)
    timeout_s = left_s(end)
    if member.backend == "nccl":
        return open_nccl(
            store,
            rank=member.rank,
            size=member.world_size,
            name=member.name,
            join_timeout_s=timeout_s,
            timeout_s=timeout_s,
        )
    return open_gloo(
        store,
        rank=member.rank,
        size=member.world_size,
        name=member.name,
        address=place.address,
        connections=meeting.offer.connections if meeting.offer is not None else 1,
        join_timeout_s=timeout_s,
        timeout_s=timeout_s,
    )
