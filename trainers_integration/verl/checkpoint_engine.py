"""verl's checkpoint engine over our transports: rank 0 of the trainer publishes to all replicas at once.

Nothing passes through the workers beside the replicas. All engines get one update: they begin it together, have all
voted before one commits, and each rank of an engine keeps only its part.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import torch

from rollout.errors import ConfigError

from ..actors import actor_named, answer, here, this_address
from ..pushing import Pusher, Weights, checked_options, exhaust, exhausted_on_error
from .adapter import leading_server
from .options import NAME


class PublishingCheckpointEngine:
    """One in each worker of the trainer and of the replicas (`checkpoint_engine.backend=rollout_sync`).

    Options, `checkpoint_engine.engine_kwargs["rollout_sync"]`: `transport` ("auto": memory where all replicas are on
    the node of the trainer's rank 0, else "process_group"), and what else `WeightPublisher` takes.
    """

    wire_format = NAME

    def __init__(
        self,
        bucket_size: int,
        is_master: bool = False,
        transport: str = "auto",
        **publisher_options: Any,
    ) -> None:
        """bucket_size: bytes. is_master: this is rank 0 of the trainer."""
        self._bucket_bytes = bucket_size
        self._is_master = is_master
        self._transport = transport
        self._options = checked_options(
            publisher_options, f"checkpoint_engine.engine_kwargs[{NAME!r}]"
        )
        self._servers: list[tuple[str, str]] = []
        self._pusher: Pusher | None = None

    def prepare(self) -> dict[str, Any]:
        """Where this worker is, and the server of the replica that it leads."""
        return {"node": here(), "server": leading_server()}

    @classmethod
    def build_topology(
        cls, actor_wg_world_size: int, rollout_world_size: int, metadata: list[dict[str, Any]]
    ) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        """Arguments of `init_process_group` for each worker: all get the servers, one alone will use them."""
        workers = metadata[actor_wg_world_size:]
        servers = [(meta["server"], meta["node"]) for meta in workers if meta["server"] is not None]
        return (
            {"servers": [servers] * actor_wg_world_size},
            {"servers": [servers] * rollout_world_size},
        )

    def init_process_group(self, servers: Sequence[tuple[str, str]]) -> None:
        """Remember the (server, node) of every replica; a group, if one is needed, is made with the first update."""
        if list(servers) != self._servers:
            self.close()
            self._servers = list(servers)

    def finalize(self) -> None:
        """Memory and groups stay for the next update, except on a GPU, where training needs the memory."""
        if torch.cuda.is_available():
            self.close()

    def close(self) -> None:
        """Give memory and groups back; safe to call twice."""
        if self._pusher is not None:
            self._pusher.close()
            self._pusher = None

    async def send_weights(
        self, weights: Weights, global_steps: int | None = None
    ) -> dict[str, float]:
        """Publish; on other ranks than the master only exhaust `weights`. Returns what verl logs about it."""
        if not self._is_master:
            await exhaust(weights)
            return {}
        async with exhausted_on_error(weights) as stream:
            if self._pusher is None:
                self._pusher = await self._connected()
            report = await self._pusher.push(stream, global_steps)
        return {"rollout_sync/version": float(report.version)}

    async def receive_weights(
        self, global_steps: int | None = None
    ) -> AsyncIterator[tuple[str, torch.Tensor]]:
        """Nothing: the engines have it from the publisher."""
        return
        yield "", torch.empty(0)  # unreachable: it makes this a generator

    async def _connected(self) -> Pusher:
        if not self._servers:
            raise ConfigError(
                f"checkpoint_engine.backend={NAME}: got no replica of rollout.name={NAME}, expected at least one"
            )
        handles = [actor_named(name) for name, _ in self._servers]
        asked = asyncio.gather(*[handle.address.remote() for handle in handles])
        addresses = await answer(asked, "the servers of the replicas")
        options: dict[str, Any] = {"transport": self._transport, **self._options}
        if self._transport == "auto" and any(node != here() for _, node in self._servers):
            options["transport"] = "process_group"
        if options["transport"] == "process_group":
            options.setdefault("group_host", this_address())
        return Pusher(addresses, bucket_bytes=self._bucket_bytes, **options)
