"""Another member of an update group, in a process of its own: runs the commands that it reads, one JSON a line.

A plain trainer here makes its group with `torch.distributed` alone, in the ways that trainers do.
"""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from weight_sync.errors import SyncError
from weight_sync.staging.joined_group import JoinedGroup
from weight_sync.transports.trainer_group import TrainerGroup

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "int64": torch.int64}


def content(num_bytes: int, seed: int) -> torch.Tensor:
    """The bytes that both ends expect."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num_bytes,), generator=generator, dtype=torch.uint8)


class Peer:
    """The groups of this process."""

    def __init__(self) -> None:
        self.group: TrainerGroup | JoinedGroup | None = None
        self.plain: Any = None
        self.store: Any = None
        self.how = ""

    def serve(self, **options: Any) -> int:
        self.destroy()
        self.group = TrainerGroup.serve(**options)
        return self.group.master_port

    def join(self, **options: Any) -> None:
        self.destroy()
        self.group = JoinedGroup.join(master_address="127.0.0.1", **options)

    def joined(self) -> bool:
        assert self.group is not None
        self.group.joined.result()
        return isinstance(self.group, TrainerGroup) or self.group.peer_is_ours

    def broadcast(
        self, num_bytes: int, seed: int, ranges: Any = None, timeout_s: float = 60
    ) -> None:
        assert isinstance(self.group, TrainerGroup)
        self.group.broadcast(content(num_bytes, seed), ranges, timeout_s=timeout_s).result()

    def receive(self, num_bytes: int, seed: int, ranges: Any = None, timeout_s: float = 60) -> bool:
        assert isinstance(self.group, JoinedGroup)
        buffer = self.group.landing(num_bytes)
        buffer = torch.zeros(num_bytes, dtype=torch.uint8) if buffer is None else buffer
        self.group.receive_into(buffer, ranges, timeout_s=timeout_s).result()
        return torch.equal(buffer, content(num_bytes, seed))

    def destroy(self) -> None:
        if self.group is not None:
            self.group.destroy()
        self.group = None

    def plain_connect(self, how: str, port: int, world_size: int, name: str) -> None:
        self.how = how
        timeout = timedelta(seconds=120)
        if how == "default group":
            url = f"tcp://127.0.0.1:{port}"
            dist.init_process_group("gloo", init_method=url, world_size=world_size, rank=0)
            return
        url = f"tcp://127.0.0.1:{port}"
        store, rank, size = next(dist.rendezvous(url, 0, world_size, timeout=timeout))
        store.set_timeout(timeout)
        self.store = store
        if how == "constructor":
            prefixed = c10d.PrefixStore(name, store)
            self.plain = dist.ProcessGroupGloo(prefixed, rank, size, timeout=timeout)
            return
        self.plain, _ = c10d._new_process_group_helper(
            size,
            rank,
            [],
            c10d.Backend("gloo"),
            c10d.PrefixStore(name, store),
            group_name=name,
            timeout=timeout,
        )
        c10d._world.pg_group_ranks[self.plain] = {i: i for i in range(size)}

    def plain_broadcast(self, tensors: list[tuple[str, list[int], int]]) -> None:
        for dtype, shape, seed in tensors:
            itemsize = DTYPES[dtype].itemsize
            num_bytes = itemsize * torch.Size(shape).numel()
            tensor = content(num_bytes, seed).view(DTYPES[dtype]).view(shape)
            if self.how == "constructor":
                options = c10d.BroadcastOptions()
                options.rootRank = 0
                self.plain.broadcast([tensor], options).wait()
            else:
                dist.broadcast(tensor, 0, group=self.plain)

    def plain_destroy(self) -> None:
        if self.how == "constructor":
            self.plain.shutdown()
        else:
            dist.destroy_process_group(self.plain)
        self.plain = self.store = None

    def default_group(self, port: int, world_size: int, rank: int) -> None:
        url = f"tcp://127.0.0.1:{port}"
        dist.init_process_group("gloo", init_method=url, world_size=world_size, rank=rank)

    def default_sum(self) -> int:
        total = torch.tensor(dist.get_rank() + 1)
        dist.all_reduce(total)
        return int(total)

    def default_destroy(self) -> None:
        dist.destroy_process_group()

    def footprint(self) -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

    def is_idle(self) -> bool:
        return self.group is None and self.plain is None and not dist.is_initialized()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


def main() -> None:
    torch.set_num_threads(1)
    peer = Peer()
    print(json.dumps({"result": "ready"}), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        started = time.monotonic()
        try:
            answer = {"result": getattr(peer, command.pop("do"))(**command)}
        except SyncError as error:
            answer = {"error": type(error).__name__, "message": str(error)}
        except Exception as error:
            answer = {"error": f"untyped {type(error).__name__}", "message": str(error)}
        print(json.dumps({**answer, "seconds": time.monotonic() - started}), flush=True)


if __name__ == "__main__":
    main()
