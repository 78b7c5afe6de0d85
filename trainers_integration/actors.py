"""What adapters ask of Ray, in one place: who runs where, and actors by their names."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from weight_sync.errors import DeadlineExceeded

ANSWER_S = 1800.0
"""How long an actor may take to answer: it may be reading a large model, or moving it to the host."""


def here() -> str:
    """Id of this process's node."""
    import ray

    node: str = ray.get_runtime_context().get_node_id()
    return node


def this_address() -> str:
    """Address of this node, as others of the cluster reach it."""
    import ray

    address: str = ray.util.get_node_ip_address()
    return address.strip("[]")


def listen_address(node_ip: str) -> str:
    """Where a server on the node `node_ip` listens: on this machine alone where the cluster has no other node."""
    import ray

    alone = sum(bool(node["Alive"]) for node in ray.nodes()) == 1
    host = f"[{node_ip}]" if ":" in node_ip else node_ip
    return f"tcp://{'127.0.0.1' if alone else host}:0"


def actor_named(name: str) -> Any:
    """Handle of a living actor; `ValueError` where there is none of that name."""
    import ray

    return ray.get_actor(name)


def start_actor(
    kind: type,
    *arguments: Any,
    node_id: str | None = None,
    ray_options: Mapping[str, Any],
    **named: Any,
) -> Any:
    """Start an actor of the class `kind`, on the node `node_id` (None: where Ray likes); its handle, at once."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    options = dict(ray_options)
    if node_id is not None:
        options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node_id=node_id, soft=False)
    return ray.remote(kind).options(**options).remote(*arguments, **named)


def wait_for(references: list[Any], what: str, *, timeout_s: float = ANSWER_S) -> list[Any]:
    """The values of references, from outside of an event loop; `DeadlineExceeded` says that `what` did not come."""
    import ray

    try:
        values: list[Any] = ray.get(references, timeout=timeout_s)
    except ray.exceptions.GetTimeoutError:
        raise _late(what, timeout_s) from None
    return values


async def answer(reference: Any, what: str, *, timeout_s: float = ANSWER_S) -> Any:
    """The value of a reference; `DeadlineExceeded` says that `what` did not come."""
    try:
        async with asyncio.timeout(timeout_s):
            return await reference
    except TimeoutError as error:
        if isinstance(error, DeadlineExceeded):  # the actor's own
            raise
        raise _late(what, timeout_s) from None


def end_actors(actors: list[Any]) -> None:
    """End actors that nobody will use, also those that Ray has not placed yet."""
    import ray

    for actor in actors:
        ray.kill(actor)


def _late(what: str, timeout_s: float) -> DeadlineExceeded:
    return DeadlineExceeded(
        f"{what}: got no answer in {timeout_s:.0f} s, expected one; Ray waits for ever for CPUs or GPUs that the "
        "cluster does not have free: compare `ray status` with what the actors ask for"
    )
