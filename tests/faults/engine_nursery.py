"""Makes trainers and owners of engines on demand: forks of a process that has imported everything already.

Reads a line of JSON for each; the fork writes lines of JSON to the file that the request names. The first has its pid.

trainer    publishes one version to an address (or stages it and never commits), says how that went, waits to be killed
owner      starts an engine or a pool, says its address and pids, and waits to be killed
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from versions import version_weights

from rollout import Engine, RolloutPool
from weight_sync import WeightPublisher
from weight_sync.transports.group_arena import GroupArena

BUCKET_BYTES = 100_000
"""Over a group: several buckets."""


def main() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        if os.fork() == 0:
            run(json.loads(line))
            os._exit(0)


def run(request: dict[str, Any]) -> None:
    with open(request["report"], "w", buffering=1) as report:
        say(report, pid=os.getpid())
        act = {"trainer": publish, "owner": own}[request["role"]]
        act(report, **request["options"])
        wait_to_be_killed()


def say(report: Any, **message: Any) -> None:
    report.write(json.dumps(message) + "\n")


def publish(
    report: Any,
    address: str,
    folder: str,
    number: int,
    commits: bool,
    transport: Any,
    halfway: bool,
    options: dict[str, Any],
) -> None:
    if halfway:
        send_one_bucket(report)
    buckets = {"bucket_bytes": BUCKET_BYTES} if transport == "process_group" else {}
    publisher = WeightPublisher(address, timeout_s=60.0, transport=transport, **buckets)
    tensors = version_weights(Path(folder), number)
    start = time.monotonic()
    try:
        if not commits:
            publisher.begin(**options)
            say(report, staged=publisher.send(tensors).num_tensors)
            return
        done = publisher.publish(tensors, **options)
    except Exception as error:
        seconds = time.monotonic() - start
        say(report, error=type(error).__name__, message=str(error), seconds=seconds)
    else:
        say(report, version=done.version, fingerprint=done.fingerprint)


def send_one_bucket(report: Any) -> None:
    """Over a group: what comes after the first bucket is announced, and then its bytes do not come."""
    send, sent = GroupArena.send, []

    def send_first(self: GroupArena, ranges: Any, timeout_s: float) -> Any:
        if not sent:
            sent.append(True)
            return send(self, ranges, timeout_s)
        say(report, halfway=True)
        return Future()

    GroupArena.send = send_first  # type: ignore[method-assign]


def wait_to_be_killed() -> None:
    """Until the nursery is gone."""
    nursery = os.getppid()
    while os.getppid() == nursery:
        time.sleep(0.05)


def own(
    report: Any, folder: str, points: str, env: dict[str, str], ray: str, options: dict[str, Any]
) -> None:
    from engine_faults import use_breakpoints
    from forks import Zygote

    os.environ.update(env)
    tempfile.tempdir = None
    use_breakpoints(Path(points), Zygote(fork=True))
    if ray:
        connect(ray)
    engine: Any
    if "num_replicas" in options:
        engine = RolloutPool(folder, **options)
        pids = [pid for replica in engine.replicas() for pid in replica.pids]
    else:
        engine = Engine(folder, **options)
        pids = engine._executor.pids
    say(report, address=engine.address, pids=pids)
    wait_to_be_killed()
    engine.shutdown()


def connect(address: str) -> None:
    """Be the driver of a job on a Ray cluster."""
    import ray

    ray.init(address=address, log_to_driver=False, logging_level="ERROR")


if __name__ == "__main__":
    main()
