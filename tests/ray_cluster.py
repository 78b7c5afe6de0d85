"""A Ray cluster of this machine's own for tests; see `conftest` for who may have one at a time."""

from __future__ import annotations

import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_TOKEN = secrets.token_hex(32)
"""For all clusters of this process: Ray goes on showing the first one that it was given."""


@contextmanager
def ray_cluster(*, num_nodes: int, cpus_per_node: int, gpus_per_node: int = 0) -> Iterator[Any]:
    """A `ray.cluster_utils.Cluster` to which this process is connected.

    Ports are the system's choice, and nothing is left in the usual folders. `cluster.temporary` is where processes of
    the cluster make temporary files.
    """
    with pytest.MonkeyPatch.context() as environment:
        # Sockets below have long names, and a path to a socket must be short.
        folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
        temporary = Path(folder) / "t"
        (temporary / "ray").mkdir(parents=True)  # Ray notes the current cluster there.
        environment.setenv("RAY_USAGE_STATS_ENABLED", "0")
        environment.setenv("RAY_AUTH_TOKEN", _TOKEN)
        environment.setenv("TMPDIR", str(temporary))
        import ray
        from ray.cluster_utils import Cluster

        node = {
            "num_cpus": cpus_per_node,
            "num_gpus": gpus_per_node,
            "object_store_memory": 80 << 20,
        }
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
