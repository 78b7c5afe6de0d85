"""What a Ray actor runs for one rank of an engine: an ordinary class; only `distributed.ray_runtime` knows Ray."""

from __future__ import annotations

import logging
import os

import msgspec
import torch

from weight_sync.process_groups.rendezvous import StoreServer

from ...config import EngineConfig
from ...distributed.placement import ProcessPlace
from ...distributed.ray_runtime import this_place
from ...errors import ConfigError
from ..loop.ranks import RankSpec
from .rank_server import RankServer, failure_report, log_level

logger = logging.getLogger(__name__)


class RankHost:
    """One rank in an actor's process; its owner calls `place`, on rank 0 `serve_store`, `start`, then `run`."""

    def __init__(self) -> None:
        self._store: StoreServer | None = None
        self._server: RankServer | None = None

    def place(self) -> ProcessPlace:
        """Where this process is and what it was given."""
        return this_place()

    def serve_store(self, timeout_s: float) -> int:
        """Serve the rendezvous of the engine's ranks, all of them on this node; returns the port."""
        self._store = StoreServer(timeout_s=timeout_s)
        return self._store.port

    def start(self, spec: bytes, config: bytes) -> dict[str, str]:
        """Meet the other ranks and load; returns `{"address": ...}` or `{"error": ..., "code": ...}`."""
        try:
            wanted = msgspec.json.decode(config, type=EngineConfig)
            logging.basicConfig(level=log_level(wanted))
            rank = msgspec.json.decode(spec, type=RankSpec)
            if wanted.num_threads is not None:
                torch.set_num_threads(wanted.num_threads)
            device = device_in_actor(
                wanted.device, this_place().gpu_ids, os.environ.get("CUDA_VISIBLE_DEVICES")
            )
            self._server = RankServer(wanted, msgspec.structs.replace(rank, device=device))
        except Exception as error:
            return failure_report(error)
        return {"address": self._server.address}

    def run(self) -> None:
        """Serve until a client says `Shutdown`. The call ends when the rank does: that is how its end is noticed."""
        assert self._server is not None, "start() comes first"
        self._server.run()


def device_in_actor(configured: str, gpu_ids: tuple[str, ...], visible: str | None) -> str:
    """The device of the one rank in this process.

    gpu_ids: what Ray gave it, by the machine's numbers. visible: `CUDA_VISIBLE_DEVICES`, which Ray usually sets to just
    those, but may have been told to leave alone; then the rank must find its own among all.
    """
    if configured not in ("auto", "cuda"):
        return configured  # A caller who names a device knows better.
    if not gpu_ids:
        if configured == "cuda":
            raise ConfigError(
                "device: got 'cuda', but Ray gave the rank no GPU; expected at least a fraction of one; set "
                "ray_num_gpus, and start Ray on a node with GPUs"
            )
        return "cpu"
    if visible is None:
        return f"cuda:{gpu_ids[0]}"
    seen = [part.strip() for part in visible.split(",")]
    return f"cuda:{seen.index(gpu_ids[0]) if gpu_ids[0] in seen else 0}"
