"""How the members of an update group find each other: our own trainer's way, and that of plain `torch.distributed`.

Our trainer counts its engine ranks in before anyone connects, so that a missing or failed one is named in the error:

    trainer: offer -> (all ready) -> go        engine rank: (offer) -> ready -> (go)

A trainer that follows the public names writes none of these keys. It makes its group under a prefix that depends on how
it makes it, and connects at once; the first key that its rank 0 writes gives the prefix away.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
from torch.cuda import nccl
from torch.distributed import Store

from ..errors import ProtocolError, TransportError
from .rendezvous import has, poll, put, take

PROTOCOL_VERSION = 1
"""Raised when the keys change their meaning."""


class GroupTerms(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What our trainer says about its group; what the engine was told must agree."""

    protocol: int
    """`PROTOCOL_VERSION` of the trainer."""
    world_size: int
    """Number of members, the trainer included."""
    backend: str
    """"gloo" or "nccl"."""
    connections: int
    """Independent sockets between two members."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Meeting:
    """Under which keys the members of a group connect."""

    prefix: str
    """What precedes the backend's own keys in the store."""
    offer: GroupTerms | None
    """What our own trainer offered; None for another trainer."""


def offered_prefix(name: str) -> str:
    """Where groups of our own trainer connect."""
    return f"{name}/update_group"


def plain_prefixes(name: str, backend: str) -> tuple[str, ...]:
    """Where groups of other trainers connect, by the way in which they are made (the same in torch 2.11 to 2.13)."""
    device = "cuda" if backend == "nccl" else "cpu"
    return (
        f"{name}/{name}//{device}/",  # torch's private helper over PrefixStore(name, store), as trainers call it
        name,  # the backend's constructor over PrefixStore(name, store)
        f"default_pg/0//{device}/",  # init_process_group, when the group is the trainer's default one
    )


def find_plain(store: Store, name: str, backend: str) -> Meeting | None:
    """The meeting of a trainer that is not ours, once its rank 0 has written its first key.

    With NCCL that happens when it starts its first broadcast, not before.
    """
    first_key = "0" if backend == "nccl" else "0/0"
    for prefix in plain_prefixes(name, backend):
        if has(store, f"{prefix}/{first_key}"):
            return Meeting(prefix=prefix, offer=None)
    return None


def find_terms(store: Store, name: str, world_size: int, backend: str) -> Meeting | None:
    """The meeting of our own trainer, once it has offered one; `TransportError` when it offers something else."""
    prefix = offered_prefix(name)
    if not has(store, f"{prefix}/offer"):
        return None
    try:
        offer = msgspec.json.decode(take(store, f"{prefix}/offer"), type=GroupTerms)
    except msgspec.DecodeError as error:
        raise ProtocolError(
            f"update group {name!r}: got an offer that cannot be read ({error}), expected protocol {PROTOCOL_VERSION}; "
            "use the same release on both sides"
        ) from error
    expected = (PROTOCOL_VERSION, world_size, backend)
    if (offer.protocol, offer.world_size, offer.backend) != expected:
        raise TransportError(
            f"update group {name!r}: got an offer of (protocol, world size, backend) "
            f"{(offer.protocol, offer.world_size, offer.backend)}, expected {expected}; tell both the same"
        )
    return Meeting(prefix=prefix, offer=offer)


def report_failure(store: Store, name: str, rank: int, reason: str) -> None:
    """Tell the others, while they still wait, that `rank` will not come."""
    put(store, f"{offered_prefix(name)}/failed", f"rank {rank} failed: {reason}")


def attend(
    store: Store, name: str, rank: int, *, gpu: str, end: float, abandoned: Callable[[], bool]
) -> None:
    """Engine rank: say that it is ready, and on which GPU, and wait until all are."""
    prefix = offered_prefix(name)
    put(store, f"{prefix}/ready/{rank}", gpu or "cpu")

    def all_here() -> bool | None:
        _raise_failure(store, name)
        return has(store, f"{prefix}/go") or None

    poll(
        all_here,
        end=end,
        abandoned=abandoned,
        late=lambda: (
            f"update group {name!r}: got no sign from the trainer that all members have come, expected one by the "
            "deadline; look for the member that is missing"
        ),
    )


def convene(
    store: Store,
    name: str,
    offer: GroupTerms,
    *,
    gpu: str,
    end: float,
    abandoned: Callable[[], bool],
) -> Meeting:
    """Trainer: offer the group, and wait until all engine ranks are ready. `gpu`: the trainer's own."""
    prefix = offered_prefix(name)
    put(store, f"{prefix}/offer", msgspec.json.encode(offer).decode())
    missing = list(range(1, offer.world_size))

    def all_ready() -> bool | None:
        _raise_failure(store, name)
        missing[:] = [rank for rank in missing if not has(store, f"{prefix}/ready/{rank}")]
        return None if missing else True

    poll(
        all_ready,
        end=end,
        abandoned=abandoned,
        late=lambda: (
            f"update group {name!r}: got no sign of ranks {missing} by the deadline, expected all of 1 to "
            f"{offer.world_size - 1}; check that these engines live and were told this address, port and name"
        ),
    )
    if offer.backend == "nccl" and not _can_share_a_gpu():
        gpus = {
            rank: take(store, f"{prefix}/ready/{rank}").decode()
            for rank in range(1, offer.world_size)
        }
        _check_gpus(store, name, {0: gpu, **gpus})
    put(store, f"{prefix}/go", "1")
    return Meeting(prefix=prefix, offer=offer)


def _check_gpus(store: Store, name: str, gpus: dict[int, str]) -> None:
    """NCCL finds out only while it connects, and then members without a double wait for the others."""
    first: dict[str, int] = {}
    for rank, gpu in gpus.items():
        other = first.setdefault(gpu, rank)
        if other != rank:
            reason = (
                f"it is on the same GPU as rank {other} ({gpu}), where NCCL takes one member; on one machine use "
                "transport='shared_memory', elsewhere group_backend='gloo'"
            )
            report_failure(store, name, rank, reason)
            _raise_failure(store, name)


def _can_share_a_gpu() -> bool:
    return os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") == "1" and nccl.version() >= (2, 30)


def _raise_failure(store: Store, name: str) -> None:
    key = f"{offered_prefix(name)}/failed"
    if has(store, key):
        reason = take(store, key).decode(errors="replace")
        raise TransportError(
            f"update group {name!r}: got word that {reason[:500]}, expected every member to join; make a new group"
        )
