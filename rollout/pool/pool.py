"""`RolloutPool`: many engines behind the surface of one."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path
from typing import Any

import msgspec

from weight_sync.wire.cancellation import threaded
from weight_sync.wire.rpc_server import private_folder

from ..config import EngineConfig
from ..distributed import ray_runtime
from ..distributed.placement import spread_over
from ..engine.engine import Engine
from ..engine.executors.local import LocalExecutor
from ..engine.executors.ray import RayExecutor, reservation
from ..engine.loop.checks import check_config
from ..errors import ConfigError
from .config import POOL_OPTIONS, PoolConfig
from .executor import PoolExecutor
from .replica import ReplicaExecutor, ReplicaStatus

_ROOM_PATIENCE_S = 3.0
"""How long a node that looks large enough may take to make room, before the next one is tried."""


class RolloutPool(Engine):
    """`num_replicas` engines with the methods of one; see `Engine` for these.

    Prompts go to the least busy replica, preferably to one that may have their beginning in its cache; the samples of
    a prompt stay together; results are in the order of the prompts, and the same whatever replica computed them. An
    update is packed once and committed on all replicas. A replica that dies is replaced by one that is brought to the
    served version first; what it was doing runs again (`meta_info["num_reruns"]`), and no request is lost.

    executor="local" (the default) starts child processes, "ray" starts actors, spread over the nodes of the cluster.
    Options are those of `PoolConfig` and of `EngineConfig`, the latter for each replica.

        with RolloutPool("checkpoints/qwen3-tiny", num_replicas=4) as pool:
            pool.generate(["2 + 2 =", "3 + 5 ="], {"n": 8})
            pool.publish(model, label="step 17")
    """

    def __init__(
        self,
        model_path: str | Path,
        *,
        num_replicas: int = 2,
        max_inflight_samples: int | None = None,
        affinity_blocks: int = 4,
        affinity_slack: int = 8,
        replace_dead: bool = True,
        max_reruns: int = 3,
        max_start_failures: int = 3,
        health_interval_s: float = 2.0,
        health_timeout_s: float = 30.0,
        **options: Any,
    ) -> None:
        given = locals()
        own = {name: given[name] for name in POOL_OPTIONS}
        try:
            self.pool_config = msgspec.convert(own, PoolConfig)
        except msgspec.ValidationError as error:
            raise ConfigError(f"RolloutPool: {error}") from None
        self.pool_config.check()
        options.setdefault("executor", "local")
        super().__init__(model_path, **options)

    def _start(self) -> PoolExecutor:
        config = self.config
        if config.executor == "inline":
            raise ConfigError(
                "executor: got 'inline' for a pool, expected 'local' or 'ray'; replicas are processes of their own"
            )
        check_config(config)
        # Each replica listens where it likes; the pool listens where it was told to.
        each = dataclasses.replace(config, listen=None)
        if config.executor == "ray":
            spread, host = RaySpread(each), ray_runtime.this_address()
            if config.listen is None:
                ip = "127.0.0.1" if ray_runtime.on_one_machine() else host
                config = dataclasses.replace(config, listen=f"tcp://{ip}:0")
            return PoolExecutor(config, self.pool_config, spread, group_host=host)
        folder = private_folder()  # Should this process be killed, its replicas remove it.
        return PoolExecutor(
            config,
            self.pool_config,
            lambda slot: LocalExecutor(each, owner_folder=folder),
            socket_folder=folder,
        )

    @property
    def _pool(self) -> PoolExecutor:
        executor = self._executor
        assert isinstance(executor, PoolExecutor)
        return executor

    def _num_engines(self) -> int:
        return len(self.replicas())

    @property
    def weight_version(self) -> str:
        """Label of the version that all replicas serve."""
        return self._pool.served.label

    @property
    def version(self) -> int:
        """Its number."""
        return self._pool.served.version

    def add_replica(self) -> int:
        """Start one more replica and bring it to the served version; returns its number when it serves."""
        return self._pool.add_replica()

    async_add_replica = threaded(add_replica)

    def remove_replica(self, number: int | None = None, timeout_s: float = 60.0) -> int:
        """Let a replica (None: the least busy one) finish its requests and end it; returns its number.

        What it has not finished after `timeout_s` runs again on the others.
        """
        return self._pool.remove_replica(number, timeout_s)

    async_remove_replica = threaded(remove_replica)

    def replicas(self) -> list[ReplicaStatus]:
        """What the replicas look like now."""
        return self._pool.replica_statuses()

    def __repr__(self) -> str:
        state = "shut down" if self._maybe_executor is None else f"{len(self.replicas())} replicas"
        return f"RolloutPool({self.config.model_path!r}, {state})"


class RaySpread:
    """Starts Ray engines on the nodes that hold the fewest of them. Any thread may call."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._wanted = reservation(config)
        self._lock = threading.Lock()
        self._nodes: dict[int, str] = {}  # slot -> node

    def __call__(self, slot: int) -> ReplicaExecutor:
        config = self._config
        if config.ray_placement_group is not None:
            first = config.ray_first_bundle + slot * config.tp_size
            return RayExecutor(dataclasses.replace(config, ray_first_bundle=first))
        if config.ray_node_id is not None:
            return RayExecutor(config)
        tried: set[str] = set()
        while (node := self._claim(slot, tried)) is not None:
            try:
                there = dataclasses.replace(config, ray_node_id=node)
                return RayExecutor(there, room_timeout_s=_ROOM_PATIENCE_S)
            except ray_runtime.NoRoomError:
                tried.add(node)
        executor = RayExecutor(config)  # Wherever there is room, as soon as there is.
        with self._lock:
            self._nodes[slot] = executor.node_id
        return executor

    def _claim(self, slot: int, tried: set[str]) -> str | None:
        """The next node to try, noted so that starts at the same time do not choose it as well."""
        nodes = ray_runtime.living_nodes()
        with self._lock:
            self._nodes.pop(slot, None)
            used = list(self._nodes.values())
            order = spread_over(nodes, used, self._wanted.total)
            left = [node for node in order if node not in tried]
            if left:
                self._nodes[slot] = left[0]
            return left[0] if left else None
