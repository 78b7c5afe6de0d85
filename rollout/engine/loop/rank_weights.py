"""Joins the weight services of an engine's ranks: trainers talk to rank 0, and rank 0 to the others."""

from __future__ import annotations

from typing import Protocol

from weight_sync.publisher.channel import Channel, RpcChannel
from weight_sync.receiver.local_channel import LocalChannel
from weight_sync.receiver.ranked_service import RankedService
from weight_sync.receiver.service import WeightService
from weight_sync.wire.messages import WeightRequest
from weight_sync.wire.rpc import Call, RpcServer

from .ranks import RankGroups


class WeightFront(Protocol):
    """Where an engine loop hands messages about weights."""

    def handle(self, call: Call) -> None:
        """Queue a call; returns at once."""

    def close(self) -> None:
        """End the session, give back the arenas, fail what is queued."""


class LeadingWeights:
    """Rank 0 of several: its own service, and the front that speaks for all."""

    def __init__(self, service: WeightService, addresses: list[str]) -> None:
        self._service = service
        channels: list[Channel] = [LocalChannel(service)]
        channels += [RpcChannel.connect(address) for address in addresses]
        self._front = RankedService(channels)

    def handle(self, call: Call) -> None:
        """Queue a call for all ranks."""
        self._front.handle(call)

    def close(self) -> None:
        """Close the front, then this rank's service."""
        self._front.close()
        self._service.close()


class FollowingWeights:
    """Any other rank: its service, and the socket through which rank 0 reaches it."""

    def __init__(self, service: WeightService, bind: str | None) -> None:
        self._service = service
        self._server = RpcServer(service.handle, WeightRequest, bind=bind, name="rank-weights")
        self._server.start()
        self.address = self._server.address

    def handle(self, call: Call) -> None:
        """Queue a call for this rank alone."""
        self._service.handle(call)

    def close(self) -> None:
        """Close the socket and the service."""
        self._service.close()
        self._server.close()


def connect_ranks(service: WeightService, ranks: RankGroups) -> WeightFront:
    """What this rank's loop hands weight messages to; all ranks call it at the same time."""
    group, rank = ranks.order, ranks.spec.rank
    if ranks.spec.size == 1:
        return service
    if rank == 0:
        addresses = [group.recv_object(str, src=other) for other in range(1, group.size)]
        return LeadingWeights(service, addresses)
    following = FollowingWeights(service, ranks.spec.bind(f"rank-{rank}"))
    group.send_object(following.address, 0)
    return following
