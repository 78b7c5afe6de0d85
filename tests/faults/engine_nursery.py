"""Makes trainers and owners of engines on demand: forks of a process that has imported everything already.

Reads a line of JSON for each; the fork writes lines of JSON to the file that the request names. The first has its pid.
With such a line as its argument it does that itself: a process that was forked is not one to use CUDA in.

trainer    publishes one version to an address (or stages it and never commits), says how that went, waits to be killed;
           or publishes the next one to the engine whose address it finds in a file, and gives everything back
owner      starts an engine or a pool, says its address and pids, and waits to be killed
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "sync"))

import torch
from ipc_stand_in import PlainPatch, stand_in
from versions import version_weights

from rollout import Engine, RolloutPool
from weight_sync import WeightPublisher
from weight_sync.publisher import endpoint
from weight_sync.transports.cuda_ipc import CudaIpcArena
from weight_sync.transports.group_arena import GroupArena

BUCKET_BYTES = 100_000
"""Over a group: several buckets."""


def main() -> None:
    torch.set_num_threads(1)
    if len(sys.argv) > 1:
        run(json.loads(sys.argv[1]))
        return
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
    device: str = "cpu",
    then_to: str = "",
) -> None:
    """then_to: the file with the address of the engine that gets the next version; "": there is none."""
    if halfway:
        send_one_bucket(report)
    if device != "cpu":
        torch.cuda.set_device(torch.device(device))
    elif transport == "cuda_ipc":
        stand_in(PlainPatch())
    buckets = {"bucket_bytes": BUCKET_BYTES} if transport == "process_group" else {}
    what_is_open = watched()
    publisher = WeightPublisher(address, timeout_s=60.0, transport=transport, **buckets)
    tensors = weights_on(device, folder, number)
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
    if then_to:
        publisher.close()
        still_open = what_is_open()
        target = wait_for_line(Path(then_to))
        with WeightPublisher(target, timeout_s=60.0, transport=transport, **buckets) as publisher:
            done = publisher.publish(weights_on(device, folder, number + 1), **options)
        say(report, version=done.version, left=[still_open, what_is_open()])


def weights_on(device: str, folder: str, number: int) -> dict[str, torch.Tensor]:
    return {
        name: tensor.to(device) for name, tensor in version_weights(Path(folder), number).items()
    }


def watched() -> Callable[[], list[str]]:
    """Call the answer, soon or later, for what publishers of this process then hold that they have been told to close.

    Waits up to 20 seconds for there to be nothing.
    """
    arenas: list[CudaIpcArena] = []
    threads = set(threading.enumerate())

    class Watched(CudaIpcArena):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            arenas.append(self)
            super().__init__(*arguments, **options)

    endpoint.CudaIpcArena = Watched  # type: ignore[misc]

    def what_is_open() -> list[str]:
        end = time.monotonic() + 20.0
        while True:
            found = ["an arena" for arena in arenas if arena._allocation is not None]
            found += [thread.name for thread in threading.enumerate() if thread not in threads]
            if not found or time.monotonic() > end:
                return found
            time.sleep(0.01)

    return what_is_open


def wait_for_line(path: Path) -> str:
    """The line of a file, once it is there."""
    owner = os.getppid()
    while os.getppid() == owner:
        if path.exists() and (text := path.read_text()).endswith("\n"):
            return text.strip()
        time.sleep(0.01)
    os._exit(0)


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
