"""Joins the weight services of an engine's ranks: trainers talk to rank 0, and rank 0 to the others."""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol

import msgspec

from weight_sync.errors import ProtocolError
from weight_sync.receiver.local_channel import LocalChannel
from weight_sync.receiver.ranked_service import RankedService
from weight_sync.receiver.service import WeightService
from weight_sync.wire.channel import Channel, RpcChannel, connect_weights
from weight_sync.wire.messages import Abort, WeightRequest
from weight_sync.wire.rpc import Call, RpcClient, RpcServer

from .ranks import RankGroups


class WeightFront(Protocol):
    """Where an engine loop hands messages about weights."""

    def handle(self, call: Call) -> None:
        """Queue a call; returns at once."""

    def close(self) -> None:
        """End the session, give back the arenas, fail what is queued."""


class FromRank0(msgspec.Struct, frozen=True, kw_only=True, tag=True, forbid_unknown_fields=True):
    """What rank 0 tells another rank. Nobody else may tell it anything: the ranks would part ways."""

    secret: bytes
    """What the rank gave to rank 0 alone."""
    body: WeightRequest
    """The message."""


class RankChannel(RpcChannel):
    """Rank 0's way to another rank."""

    def __init__(self, client: RpcClient, secret: bytes) -> None:
        super().__init__(client, owned=True)
        self._secret = secret

    def call(self, message: Any, timeout_s: float) -> Any:
        """As `Channel.call`."""
        return super().call(FromRank0(secret=self._secret, body=message), timeout_s)

    def submit(self, message: Any, timeout_s: float) -> Future[Any]:
        """As `Channel.submit`."""
        return super().submit(FromRank0(secret=self._secret, body=message), timeout_s)


class RankAddress(msgspec.Struct, frozen=True, kw_only=True):
    """How rank 0 reaches another rank."""

    address: str
    """Of its socket."""
    secret: bytes
    """What every message must carry."""


class LeadingWeights:
    """Rank 0 of several: its own service, and the front that speaks for all."""

    def __init__(
        self,
        service: WeightService,
        ranks: list[RankAddress],
        on_lost: Callable[[Exception], None],
    ) -> None:
        self._service = service
        channels: list[Channel] = [LocalChannel(service)]
        channels += [RankChannel(connect_weights(rank.address), rank.secret) for rank in ranks]
        self._front = RankedService(channels, on_lost=on_lost)

    def handle(self, call: Call) -> None:
        """Queue a call for all ranks."""
        if isinstance(call.body, Abort):
            # Not behind the write that it is to prevent; rank 0 decides for all.
            inner_id = self._front.known_as(call.body.session_id)
            if inner_id is not None:
                self._service.receiver.give_up_write(inner_id)
        self._front.handle(call)

    def close(self) -> None:
        """Close the front, then this rank's service."""
        self._front.close()
        self._service.close()


class _Told:
    """`rpc.Call` of rank 0, without the secret around its body."""

    def __init__(self, call: Call, body: Any) -> None:
        self.body = body
        self.deadline = call.deadline
        self.peer = call.peer
        self.reply = call.reply
        self.stream = call.stream
        self.fail = call.fail


class FollowingWeights:
    """Any other rank: its service, and the socket through which rank 0 reaches it."""

    def __init__(self, service: WeightService, bind: str | None) -> None:
        self._service = service
        self._secret = secrets.token_bytes(32)
        self._server = RpcServer(self._hear, FromRank0, bind=bind, name="rank-weights")
        self._server.start()
        self.address = RankAddress(address=self._server.address, secret=self._secret)

    def handle(self, call: Call) -> None:
        """Queue a call for this rank alone."""
        self._service.handle(call)

    def close(self) -> None:
        """Close the socket and the service."""
        self._service.close()
        self._server.close()

    def _hear(self, call: Call) -> None:
        told: FromRank0 = call.body
        if not hmac.compare_digest(told.secret, self._secret):
            call.fail(
                ProtocolError(
                    "a rank listens to rank 0 alone: got a message without its secret; use the engine's address"
                )
            )
            return
        self._service.handle(_Told(call, told.body))


def connect_ranks(
    service: WeightService, ranks: RankGroups, on_lost: Callable[[Exception], None]
) -> WeightFront:
    """What this rank's loop hands weight messages to; all ranks call it at the same time.

    `on_lost` hears of it on rank 0 when another rank cannot go on.
    """
    group, rank = ranks.order, ranks.spec.rank
    if ranks.spec.size == 1:
        return service
    if rank == 0:
        others = [group.recv_object(other, type=RankAddress) for other in range(1, group.size)]
        return LeadingWeights(service, others, on_lost)
    following = FollowingWeights(service, ranks.spec.bind(f"rank-{rank}"))
    group.send_object(following.address, 0)
    return following
