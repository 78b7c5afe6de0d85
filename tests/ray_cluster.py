"""A Ray cluster of this machine's own for tests; test processes take turns."""

from __future__ import annotations

import fcntl
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray_forks
from ray_forks import ForkedWorkers

_TOKEN = secrets.token_hex(32)
"""For all clusters of this process: Ray goes on showing the first one that it was given."""


_LOCK = Path(tempfile.gettempdir()) / "rollout-tests-ray.lock"


@contextmanager
def one_ray_at_a_time() -> Iterator[None]:
    """Ray clusters of one machine share files that say which is the current one."""
    with open(_LOCK, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def ray_cluster(
    *, num_nodes: int, cpus_per_node: int, gpus_per_node: int = 0, forks: bool = False
) -> Iterator[Any]:
    """A `ray.cluster_utils.Cluster` to which this process is connected.

    Ports are the system's choice, and nothing is left in the usual folders. `cluster.temporary` is where processes of
    the cluster make temporary files. forks: its workers are forks of a process that has imported everything; else they
    start as Ray's do.
    """
    with one_ray_at_a_time(), pytest.MonkeyPatch.context() as environment, ExitStack() as stack:
        # Sockets below have long names, and a path to a socket must be short.
        folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
        temporary = Path(folder) / "t"
        (temporary / "ray").mkdir(parents=True)  # Ray notes the current cluster there.
        environment.setenv("RAY_USAGE_STATS_ENABLED", "0")
        environment.setenv("RAY_AUTH_TOKEN", _TOKEN)
        environment.setenv("TMPDIR", str(temporary))
        environment.setenv(
            "RAY_worker_niceness", "0"
        )  # Else whatever runs beside has all of a busy machine.
        import ray
        from ray.cluster_utils import Cluster

        node = {
            "num_cpus": cpus_per_node,
            "num_gpus": gpus_per_node,
            "object_store_memory": 80 << 20,
            "include_log_monitor": False,
        }
        if forks:
            environment.setenv(ray_forks.FORKS, str(temporary))
            node["setup_worker_path"] = ray_forks.__file__
            stack.enter_context(closing(ForkedWorkers(temporary)))
        cluster = Cluster(
            initialize_head=True,
            head_node_args={**node, "include_dashboard": False, "temp_dir": folder},
        )
        cluster.temporary = temporary
        try:
            for _ in range(num_nodes - 1):
                cluster.add_node(**node)
            ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()
            shutil.rmtree(folder, ignore_errors=True)


def free_cpus(expected: float, timeout_s: float = 10.0) -> bool:
    """Whether the cluster has that many free CPUs before long."""
    import ray

    end = time.monotonic() + timeout_s
    while ray.available_resources().get("CPU", 0.0) != expected:
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True
