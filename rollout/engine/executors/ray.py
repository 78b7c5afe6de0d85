"""The engine in Ray actors, one per rank, behind the same surface.

Ray places the ranks and tells of their end. Everything else goes as with child processes: calls are typed messages over
a socket of rank 0, with ids and deadlines. When one rank dies, the others are ended too; when this process goes away,
Ray ends them all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future
from concurrent.futures import wait as wait_for
from typing import Any

import msgspec

from weight_sync.errors import SyncError
from weight_sync.time_left import left_s
from weight_sync.wire.rpc import RpcClient

from ...config import EngineConfig
from ...distributed import ray_runtime
from ...distributed.placement import ProcessPlace, Reservation
from ...distributed.ray_runtime import Actor, ReservedRoom
from ...errors import ERRORS, ConfigError
from ...protocol.commands import Shutdown
from ...protocol.wire import REPLY_TYPES
from ..loop.checks import check_config
from ..loop.ranks import RankSpec
from .over_rpc import OverRpc
from .rank_server import reported_address
from .ray_rank import RankHost


class RayExecutor(OverRpc):
    """Reserves room on one node, starts the ranks there, and notices when one dies."""

    def __init__(self, config: EngineConfig, room_timeout_s: float | None = None) -> None:
        """`room_timeout_s`: how long the node may take to make room; None: as long as the whole start."""
        check_config(config)
        self._ranks: list[Actor] = []
        self._runs: list[Future[Any]] = []
        self._dead: str | None = None
        self._closing = False
        deadline = time.monotonic() + config.start_timeout_s
        self._placement = ReservedRoom(
            reservation(config), room_timeout_s or config.start_timeout_s
        )
        try:
            self._ranks = [self._placement.start(RankHost, i) for i in range(config.tp_size)]
            self._places = self._meet(config, deadline)
            self._address = self._start_ranks(config, deadline)
            self._runs = [rank.submit("run").future for rank in self._ranks]
            self._client = RpcClient(
                self._address, REPLY_TYPES, errors=ERRORS, liveness=lambda: self._dead
            )
        except BaseException:
            self.kill()
            raise
        threading.Thread(target=self._watch, name="rollout-ray-watch", daemon=True).start()

    @property
    def pids(self) -> list[int]:
        """Process ids of the ranks, on their node."""
        return [place.pid for place in self._places]

    @property
    def node_id(self) -> str:
        """Ray's name of the node that holds the ranks."""
        return self._places[0].node_id

    def close(self) -> None:
        self._closing = True
        if self._dead is None:
            with contextlib.suppress(SyncError, OSError):
                self._connection.call(Shutdown(), timeout_s=5.0)
                wait_for(self._runs, timeout=10.0)
        self.kill()

    def kill(self) -> None:
        """End the ranks now, whatever they do, and give everything back."""
        self._closing = True
        for rank in self._ranks:
            rank.kill()
        self._placement.release()
        if self._client is not None:
            self._client.close()

    def _meet(self, config: EngineConfig, deadline: float) -> list[ProcessPlace]:
        """Where the ranks are, which is where an engine can work."""
        calls = [rank.submit("place") for rank in self._ranks]
        whole_s = config.start_timeout_s
        places: list[ProcessPlace] = [call.result(left_s(deadline), whole_s) for call in calls]
        check_places(places, config)
        return places

    def _start_ranks(self, config: EngineConfig, deadline: float) -> str:
        """Load on all ranks at once; the address of rank 0."""
        host = "127.0.0.1"  # All ranks are on one node.
        port = 0
        if config.tp_size > 1:
            port = self._ranks[0].call(
                "serve_store",
                config.start_timeout_s,
                timeout_s=left_s(deadline),
                whole_s=config.start_timeout_s,
            )
        if config.listen is None:
            ip = host if ray_runtime.on_one_machine() else self._places[0].ip
            config = dataclasses.replace(config, listen=f"tcp://{ip}:0")
        calls = []
        for number, rank in enumerate(self._ranks):
            spec = RankSpec(
                rank=number,
                size=config.tp_size,
                store_host=host if config.tp_size > 1 else "",
                store_port=port,
            )
            calls.append(
                rank.submit("start", msgspec.json.encode(spec), msgspec.json.encode(config))
            )
        # Ranks wait for each other, so the first one that fails ends the wait for all.
        reports = {call.future: call for call in calls}
        waiting = set(reports)
        while waiting:
            done, waiting = wait_for(waiting, left_s(deadline), FIRST_COMPLETED)
            for future in done or list(waiting)[:1]:
                reported_address(reports[future].result(left_s(deadline), config.start_timeout_s))
        return reported_address(calls[0].result(left_s(deadline), config.start_timeout_s))

    def _watch(self) -> None:
        """Wait for the first rank to end; then end the others."""
        done, _ = wait_for(self._runs, return_when=FIRST_COMPLETED)
        if self._closing:
            return
        ended = next(iter(done))
        rank, error = self._runs.index(ended), ended.exception()
        why = "it was shut down" if error is None else str(ray_runtime.translated(error))
        self._dead = (
            f"rank {rank} of the engine (process {self._places[rank].pid} on node {self.node_id[:8]}) is gone: {why}; "
            "start a new Engine"
        )
        for actor in self._ranks:
            actor.kill()
        self._placement.release()


def reservation(config: EngineConfig) -> Reservation:
    """What Ray is asked for; looks at the cluster where the configuration leaves the number of GPUs open."""
    num_gpus = config.ray_num_gpus
    if num_gpus is None:
        on_gpu = config.device.startswith("cuda")
        num_gpus = 1.0 if on_gpu or (config.device == "auto" and ray_runtime.has_gpus()) else 0.0
    for name, value in (("ray_num_cpus", config.ray_num_cpus), ("ray_num_gpus", num_gpus)):
        if value < 0:
            raise ConfigError(f"{name}: got {value}, expected at least 0")
    return Reservation(
        num_processes=config.tp_size,
        num_cpus=config.ray_num_cpus,
        num_gpus=num_gpus,
        node_id=config.ray_node_id,
        group_name=config.ray_placement_group,
        first_bundle=config.ray_first_bundle,
    )


def check_places(places: Sequence[ProcessPlace], config: EngineConfig) -> None:
    """`ConfigError` when the ranks ended up where an engine cannot work."""
    nodes = sorted({place.node_id[:8] for place in places})
    if len(nodes) > 1:
        raise ConfigError(
            f"the ranks of an engine must be on one node: got {len(nodes)} ({', '.join(nodes)}) in placement group "
            f"{config.ray_placement_group!r}; make it with strategy 'STRICT_PACK', or set ray_first_bundle to bundles "
            "of one node"
        )
    counts = Counter(gpu for place in places for gpu in place.gpu_ids)
    shared = sorted(gpu for gpu, count in counts.items() if count > 1)
    if shared:
        raise ConfigError(
            f"each rank needs a GPU of its own: got GPU {', '.join(shared)} for several of {len(places)} ranks, "
            "because Ray fills up a GPU before it takes the next; make a placement group with one whole GPU in each "
            "bundle, for trainer and ranks, and name it in ray_placement_group"
        )
