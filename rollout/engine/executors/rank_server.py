"""One rank of an engine in this process, whoever started the process: a child of the caller, or a Ray actor."""

from __future__ import annotations

import logging
import os

import msgspec
import torch

from weight_sync.wire.rpc import RpcServer

from ...config import EngineConfig
from ...distributed.small_sums import forbid_multicast
from ...errors import ERRORS
from ...protocol.wire import REQUEST_TYPES
from ..loop.build import build_core
from ..loop.ranks import RankSpec, device_of
from .end_within import END_S, FAILED_S, end_within

logger = logging.getLogger(__name__)


class RankServer:
    """Meets the other ranks, loads its part of the model, and serves; only rank 0 listens to clients.

    All ranks of an engine are made at about the same time, because they wait for each other.
    """

    def __init__(self, config: EngineConfig, spec: RankSpec) -> None:
        spec = msgspec.structs.replace(spec, device=device_of(spec, config.device))
        device = torch.device(spec.device or "cpu")
        if device.type == "cuda":
            # Else what names no GPU would take up memory on the first one.
            torch.cuda.set_device(device)
            forbid_multicast()
        self._core = build_core(config, spec)
        self._server: RpcServer | None = None
        if spec.rank == 0:
            bind = config.listen or spec.bind("socket")
            self._server = RpcServer(
                self._core.submit,
                REQUEST_TYPES,
                bind=bind,
                insecure=config.insecure,
                on_failure=_end_process,
            )
            self._server.start()

    @property
    def address(self) -> str:
        """Where clients connect; empty for a rank that does not listen."""
        return self._server.address if self._server is not None else ""

    def run(self) -> None:
        """Serve on this thread until a client says `Shutdown`; raises what the loop could not survive.

        Whatever still waits for something after that, this process ends in `FAILED_S` or `END_S` seconds.
        """
        try:
            self._core.run(lambda failed: end_within(FAILED_S if failed else END_S))
        finally:
            self.close_socket()

    def close_socket(self) -> None:
        """Take no more calls, and remove the socket file where there is one. Safe to repeat."""
        if self._server is not None:
            self._server.close()


def log_level(config: EngineConfig) -> str:
    """The level of a rank's process: what was asked for, else what the environment says."""
    return (config.log_level or os.environ.get("ROLLOUT_LOG_LEVEL", "WARNING")).upper()


def _end_process(error: Exception) -> None:
    """Nobody can reach this rank any more: end loudly rather than hold the memory of an engine that nobody can use."""
    logger.critical("the engine ends: it cannot be reached any more (%r)", error)
    os._exit(70)


def failure_report(error: Exception) -> dict[str, str]:
    """Why a rank did not start, for whoever started it."""
    logger.debug("start failed", exc_info=True)
    return {"error": str(error), "code": type(error).__name__}


def reported_address(report: dict[str, str]) -> str:
    """The address in a rank's report (`{"address": ...}`); raises the error, should it be one."""
    if "error" in report:
        raise ERRORS.get(report["code"], RuntimeError)(report["error"])
    return report["address"]
