"""The engine in child processes, one per rank, behind the same surface, over ZMQ with typed messages.

A child gets its configuration as JSON on its standard input, which then stays open as a lifeline: when this process
goes away, however it does, the children read end-of-file and end themselves. When one rank dies, the others are ended
too: an engine without a rank computes nothing. Nothing is pickled.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
import time

from weight_sync.errors import SyncError
from weight_sync.process_groups.rendezvous import StoreServer
from weight_sync.time_left import left_s
from weight_sync.wire.rpc import RpcClient
from weight_sync.wire.rpc_server import private_folder

from ...config import EngineConfig
from ...errors import ERRORS
from ...models.model_config import ModelConfig
from ...protocol.commands import Shutdown
from ...protocol.wire import REPLY_TYPES
from ..loop.ranks import RankSpec
from .over_rpc import OverRpc
from .rank_process import RankProcess, await_ready
from .rank_watch import RankWatch


class LocalExecutor(OverRpc):
    """Starts the ranks, waits until the model is loaded, and notices when one dies."""

    def __init__(self, config: EngineConfig, owner_folder: str = "") -> None:
        """`owner_folder`: see `RankSpec`."""
        self._owner_folder = owner_folder
        self._model = ModelConfig.from_folder(config.model_path)
        self._lock = threading.Lock()
        self._store = StoreServer(timeout_s=config.start_timeout_s) if config.tp_size > 1 else None
        self._ranks: list[RankProcess] = []
        self._watch = RankWatch(self._ranks)
        self._sockets = private_folder()  # Ours to remove: a rank that is killed cannot.
        try:
            for rank in range(config.tp_size):
                self._ranks.append(RankProcess(config, self._spec(config, rank)))
            deadline = time.monotonic() + config.start_timeout_s
            self._address = await_ready(self._ranks, deadline, config.start_timeout_s)[0]
            self._client = RpcClient(
                self._address, REPLY_TYPES, errors=ERRORS, liveness=self._watch.why_dead
            )
            self._watch.start()
        except BaseException:
            self._stop(grace_s=0.0)
            raise

    @property
    def pids(self) -> list[int]:
        """Process ids of the ranks."""
        return [rank.pid for rank in self._ranks]

    def close(self) -> None:
        grace_s = (
            1.0  # Who does not answer, because it is stopped or hangs, is not waited for either.
        )
        if self._watch.why_dead() is None:
            with contextlib.suppress(SyncError, OSError):
                self._connection.call(Shutdown(), timeout_s=5.0)
                grace_s = 10.0
        self._connection.close()
        self._stop(grace_s)

    def kill(self) -> None:
        """End the ranks now, whatever they do, and give everything back."""
        for rank in self._ranks:
            rank.kill()
        self._connection.close()
        self._stop(grace_s=0.0)

    def _spec(self, config: EngineConfig, rank: int) -> RankSpec:
        store = self._store
        return RankSpec(
            rank=rank,
            size=config.tp_size,
            store_host="" if store is None else store.host,
            store_port=0 if store is None else store.port,
            socket_folder=self._sockets,
            owner_folder=self._owner_folder,
            model=self._model,
        )

    def _stop(self, grace_s: float) -> None:
        with self._lock:
            deadline = time.monotonic() + grace_s
            for rank in self._ranks:
                rank.let_go()
            for rank in self._ranks:
                rank.stop(left_s(deadline))
            self._watch.close()
            if self._store is not None:
                self._store.close()
            shutil.rmtree(self._sockets, ignore_errors=True)
