"""Starts the server actor of a replica beside the workers whose devices it shares."""

from __future__ import annotations

import os
from typing import Any

from rollout.errors import ConfigError

from ..actors import answer, here, listen_address, start_actor, this_address
from .options import NAME
from .server import RolloutServer


def server_name(replica_rank: int, kind: str = "", suffix: str = "") -> str:
    """Ray's name of a replica's server, by which the workers of the same replica find it."""
    return f"{NAME}_server_{kind}{replica_rank}{suffix}"


class ReplicaServers:
    """What verl's `RolloutReplica` leaves open; `plugin.replica_class` joins the two."""

    config: Any
    model_config: Any
    replica_rank: int
    rollout_mode: Any
    world_size: int
    nnodes: int
    workers: list[Any]
    servers: list[Any]
    is_reward_model: bool
    is_teacher_model: bool
    name_suffix: str
    max_concurrency: int
    _server_handle: Any
    _server_address: str

    async def launch_servers(self) -> None:
        """Start the server on the node of the replica's workers, with their devices, and wait until it serves."""
        import asyncio

        from verl.utils.device import get_visible_devices_keyword

        if self.nnodes > 1:
            raise ConfigError(
                f"rollout replica {self.replica_rank}: got {self.world_size} ranks on {self.nnodes} nodes, expected "
                "one node; lower tensor_model_parallel_size to at most n_gpus_per_node"
            )
        keyword = get_visible_devices_keyword()
        asked = [worker.__ray_call__.remote(place_of, keyword) for worker in self.workers]
        named = f"rollout replica {self.replica_rank}"
        places = await answer(asyncio.gather(*asked), f"the workers of {named}")
        node_id, node_ip, _ = places[0]
        devices = ",".join(dict.fromkeys(device for _, _, device in places if device))
        kind = "reward_" if self.is_reward_model else "teacher_" if self.is_teacher_model else ""
        server = start_actor(
            RolloutServer,
            self.config,
            self.model_config,
            mode=self.rollout_mode.value,
            replica_rank=self.replica_rank,
            listen=listen_address(node_ip),
            node_id=node_id,
            ray_options={
                "name": server_name(self.replica_rank, kind, self.name_suffix),
                "runtime_env": {"env_vars": _devices_of_workers(keyword, devices)},
                "max_concurrency": self.max_concurrency,
            },
        )
        await answer(server.launch_server.remote(), f"the server of {named}")
        self.servers = [server]
        self._server_handle = server
        address: str = await answer(server.address.remote(), f"the server of {named}")
        self._server_address = address.removeprefix("tcp://").partition("?")[0]  # it is printed


def place_of(worker: Any, keyword: str) -> tuple[str, str, str]:
    """Node, its address, and the visible devices of a worker; runs there."""
    return here(), this_address(), os.environ.get(keyword, "")


def _devices_of_workers(keyword: str, devices: str) -> dict[str, str]:
    """Ray would hide the devices from an actor that reserves none."""
    from verl.plugin.platform import get_platform

    shown: dict[str, str] = dict.fromkeys(get_platform().ray_noset_envvars(), "1")
    return {**shown, keyword: devices} if devices else shown
