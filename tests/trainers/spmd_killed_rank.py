"""One of two ranks, of which one is killed between two buckets: rank, world, store, checkpoint, address, culprit."""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

sys.path.insert(0, str(Path(__file__).parent))
import spmd_support as support

from weight_sync.spmd.publisher import SpmdPublisher
from weight_sync.spmd.share import RankShare


def main() -> None:
    rank, culprit = int(sys.argv[1]), int(sys.argv[6])
    support.join(rank, 2, sys.argv[3])
    mesh = init_device_mesh("cpu", (2,))
    named = support.checkpoint(sys.argv[4])
    publisher = SpmdPublisher(mesh, bucket_bytes=20_000, timeout_s=120)
    dist.barrier()
    if rank == culprit:
        write = RankShare.write

        def dying(self: RankShare, number: int, tensors: Any) -> Any:
            if number == 2:
                time.sleep(0.5)  # the session is open, and a bucket of both is announced
                os.kill(os.getpid(), signal.SIGKILL)
            return write(self, number, tensors)

        RankShare.write = dying  # type: ignore[method-assign]
    model = support.fsdp({name: torch.zeros_like(t) for name, t in named.items()}, mesh)
    start = time.monotonic()
    kind, text = support.outcome(lambda: publisher.publish(model, sys.argv[5]))
    assert time.monotonic() - start < 60, "noticed long before the deadline"
    print(kind, text, flush=True)
    again, _ = support.outcome(lambda: publisher.publish(model, sys.argv[5]))
    assert again == kind
    publisher.close()
    os._exit(0)  # the process group would wait for the dead


if __name__ == "__main__":
    main()
