"""gloo and NCCL backends by their own constructors, without a default group."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import Store

from ..errors import DeadlineExceeded, TransportError
from ..time_left import left
from .communicator import Communicator, wait_for_aborts
from .rendezvous import first_line

_ENVIRONMENT_LOCK = threading.Lock()
_NCCL_ENVIRONMENT = {
    # By default the watchdog of a communicator ends the process when a peer is lost. An engine outlives its trainers.
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
}


def open_gloo(
    store: Store,
    *,
    rank: int,
    size: int,
    name: str,
    address: str,
    connections: int = 1,
    join_timeout_s: float,
    timeout_s: float,
) -> Communicator:
    """Join a gloo group whose members use the keys of `store`; blocks until all have come.

    `address` is the one of this machine that the others can reach. `connections` is the number of independent sockets
    to each peer, equal on all members: consecutive operations use them in turn, and so overlap.
    """
    end = time.monotonic() + join_timeout_s
    try:
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [
            dist.ProcessGroupGloo.create_device(hostname=address) for _ in range(connections)
        ]
        options._threads = 2 * connections
        options._timeout = left(end)
        backend = dist.ProcessGroupGloo(store, rank, size, options)
    except RuntimeError as error:
        text = first_line(error)
        message = (
            f"group {name!r}, rank {rank} of {size}: cannot connect from {address}: got {text!r}"
        )
        if "timeout" in text.lower() or "timed out" in text.lower():
            raise DeadlineExceeded(
                f"{message}, expected all of them within {join_timeout_s:.1f} s; look for one that is late or dead"
            ) from error
        raise TransportError(
            f"{message}, expected every member to live and to be reachable; look for one that died"
        ) from error
    return Communicator(backend, kind="gloo", rank=rank, size=size, name=name, timeout_s=timeout_s)


def open_nccl(
    store: Store, *, rank: int, size: int, name: str, join_timeout_s: float, timeout_s: float
) -> Communicator:
    """A member of an NCCL group on the current CUDA device. It connects in its first operation, not here; and not
    before communicators that this process has given up are gone."""
    if not wait_for_aborts(join_timeout_s):
        raise DeadlineExceeded(
            f"group {name!r}, rank {rank} of {size}: NCCL has not ended an older group within {join_timeout_s:.1f} s, "
            "expected its members to be reachable or dead; look for one that is stopped, or restart this process"
        )
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(days=7)  # the deadlines here are the ones that count
    try:
        with _nccl_environment():
            backend = dist.ProcessGroupNCCL(store, rank, size, options)
    except RuntimeError as error:
        raise TransportError(
            f"group {name!r}, rank {rank} of {size}: cannot make an NCCL communicator: got {first_line(error)!r}, "
            "expected one CUDA device of its own for every member; check the devices"
        ) from error
    return Communicator(backend, kind="nccl", rank=rank, size=size, name=name, timeout_s=timeout_s)


@contextmanager
def _nccl_environment() -> Iterator[None]:
    """The constructor reads its error handling from the environment, and only from there."""
    with _ENVIRONMENT_LOCK:
        before = {key: os.environ.get(key) for key in _NCCL_ENVIRONMENT}
        os.environ.update(_NCCL_ENVIRONMENT)
        try:
            yield
        finally:
            for key, value in before.items():
                if value is None:
                    del os.environ[key]
                else:
                    os.environ[key] = value
