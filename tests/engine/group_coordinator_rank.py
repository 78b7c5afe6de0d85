"""One rank of the groups that `test_group_coordinator.py` looks at: port, another port, rank, number of ranks.

It plays all scenes one after another and prints a line for each; starting a process costs more than they do.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import msgspec
import torch
import torch.distributed as dist

from rollout.distributed.group_coordinator import GroupCoordinator
from rollout.distributed.stateless_process_group import StatelessProcessGroup
from weight_sync.errors import SyncError


class Command(msgspec.Struct):
    name: str
    payload: bytes


def meet(port: int, rank: int, size: int, name: str, **options: Any) -> StatelessProcessGroup:
    options = {"timeout_s": 120.0, "served": True, **options}
    return StatelessProcessGroup.create("127.0.0.1", port, rank, size, name=name, **options)


def coordinate(port: int, rank: int, size: int, name: str, **options: Any) -> GroupCoordinator:
    with meet(port, rank, size, name) as group:
        return GroupCoordinator.create(group, timeout_s=options.get("timeout_s", 120.0))


def error_of(call: Any) -> dict[str, Any]:
    started = time.monotonic()
    try:
        call()
    except SyncError as error:
        kind, message = type(error).__name__, str(error)
    else:
        kind, message = "", ""
    return {"kind": kind, "message": message, "seconds": time.monotonic() - started}


def collectives(port: int, rank: int, size: int) -> dict[str, Any]:
    group = coordinate(port, rank, size, "collectives")
    tensor = torch.arange(6.0).reshape(2, 3) + 100 * rank
    gathered = group.gather(tensor, dst=1, dim=0)
    half = torch.full((5,), 0.1 * (rank + 1), dtype=torch.bfloat16)
    strided = torch.arange(6.0).reshape(2, 3).t()
    target = torch.full((3,), float(rank))
    in_place = torch.ones(4)
    returned = group.all_reduce(in_place)
    result = {
        "place": [group.rank, group.size, group.world_size],
        "all_reduce": group.all_reduce(tensor.clone()).tolist(),
        "all_reduce_bits": group.all_reduce(half).view(torch.int16).tolist(),
        "all_reduce_strided": group.all_reduce(strided).tolist(),
        "in_place": returned.data_ptr() == in_place.data_ptr(),
        "all_gather_last": group.all_gather(tensor).tolist(),
        "all_gather_0": group.all_gather(tensor, 0).tolist(),
        "all_gather_bool": group.all_gather(torch.tensor([rank == 1]), dim=0).tolist(),
        "all_gather_float8": group.all_gather(
            torch.tensor([float(rank)]).to(torch.float8_e4m3fn), dim=0
        )
        .float()
        .tolist(),
        "gather": None if gathered is None else gathered.tolist(),
        "broadcast": group.broadcast(target, src=2).tolist(),
        "filled": target.tolist(),
    }
    if rank == 0:
        group.send(torch.arange(4, dtype=torch.int16), 2)
    if rank == 2:
        result["received"] = group.recv((4,), torch.int16, 0).tolist()
    group.barrier()
    group.destroy()
    group.destroy()
    result["after"] = error_of(group.barrier)
    return result


def objects(port: int, rank: int, size: int) -> dict[str, Any]:
    group = coordinate(port, rank, size, "objects")
    result: dict[str, Any] = {"sizes": []}
    for length in (0, 4050, 4096, 100_000):
        command = Command(name="run", payload=bytes(range(256)) * (length // 256 + 1))
        command.payload = command.payload[:length]
        got = group.broadcast_object(command if rank == 1 else None, 1, type=Command)
        assert got == command
        result["sizes"].append(len(got.payload))
    if rank == 2:
        group.send_object({"k": [1, None, "x"]}, 0)
    if rank == 0:
        result["received"] = group.recv_object(2)
    values = {
        "half": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3).t(),
        "step": 7,
        "scalar": torch.tensor(5),
        "none": None,
        "empty": torch.zeros(0, 3),
        "names": ["a", "b"],
    }
    got_dict = group.broadcast_tensor_dict(values if rank == 0 else None)
    result["dict"] = {
        name: [str(value.dtype), value.tolist()] if isinstance(value, torch.Tensor) else value
        for name, value in got_dict.items()
    }
    wrong: Any = {"name": "run"} if rank == 0 else None
    result["wrong"] = error_of(lambda: group.broadcast_object(wrong, type=Command))
    result["late"] = error_of(
        lambda: (
            time.sleep(4.0) if rank == 0 else group.broadcast_object(type=Command, timeout_s=0.3)
        )
    )
    group.destroy()
    return result


def several(port: int, rank: int, size: int) -> dict[str, Any]:
    """Two groups of different members, then a default group beside them, then one more."""
    everyone = coordinate(port, rank, size, "everyone")
    others = None if rank == 1 else coordinate(port, rank // 2, 2, "others")
    one = torch.ones(1)
    sums = [everyone.all_reduce(one.clone()).item()]
    dist.init_process_group(
        "gloo",
        store=dist.PrefixStore("default", dist.TCPStore("127.0.0.1", port, is_master=False)),
        rank=rank,
        world_size=size,
    )
    reduced = one.clone()
    dist.all_reduce(reduced)
    sums.append(reduced.item())
    late = coordinate(port, rank, size, "late")
    sums.append(late.all_reduce(one.clone()).item())
    if others is not None:
        sums.append(others.all_reduce(one.clone()).item())
    for group in (everyone, others, late):
        if group is not None:
            group.destroy()
    reduced = one.clone()
    dist.all_reduce(reduced)
    sums.append(reduced.item())
    dist.destroy_process_group()
    return {"sums": sums}


def stores(port: int, rank: int, size: int) -> dict[str, Any]:
    with meet(port, rank, size, "meeting") as group:
        gathered = [group.all_gather_bytes(f"{rank}:{i}".encode()).copy() for i in range(3)]
        told = [group.broadcast_bytes(b"\x00\xff" if rank == 2 else None, src=2)]
        if rank == 0:
            time.sleep(1.5)
        started = time.monotonic()
        group.barrier()
        waited_s = time.monotonic() - started
        keys = []
        for i in range(150):
            assert group.broadcast_bytes(str(i).encode() if rank == 0 else None) == b"%d" % i
            if i in (20, 149):
                group.barrier()
                keys.append(group.store.num_keys())
                group.barrier()
        again = error_of(lambda: meet(port, rank, size, "meeting", timeout_s=2.0))
        late = error_of(lambda: time.sleep(5.0) if rank == 1 else group.barrier(timeout_s=2.0))
        after = error_of(lambda: rank == 1 or group.barrier())
    return {
        "gathered": [[part.decode() for part in parts] for parts in gathered],
        "told": told[0].hex(),
        "waited_s": waited_s,
        "keys": keys,
        "again": again,
        "late": late,
        "after": after,
    }


def first_rank_serves(port: int, rank: int, size: int) -> dict[str, Any]:
    """Rank 0 serves the store, says one thing and leaves at once: the others still hear it."""
    with meet(port, rank, size, "served", served=False) as group:
        if rank:
            time.sleep(0.2 * rank)
        return {"told": group.broadcast_bytes(b"last words" if rank == 0 else None).decode()}


def killed(port: int, rank: int, size: int) -> dict[str, Any]:
    """Rank 1 dies while the others wait for it."""
    group = coordinate(port, rank, size, "killed", timeout_s=5.0)
    group.barrier()
    if rank == 1:
        time.sleep(0.3)
        os.kill(os.getpid(), 9)
    return {"error": error_of(lambda: group.all_reduce(torch.ones(1000)))}


def main() -> None:
    torch.set_num_threads(1)
    port, other_port, rank, size = map(int, sys.argv[1:])
    for scene in (collectives, objects, several, stores, first_rank_serves, killed):
        its_port = other_port if scene is first_rank_serves else port
        print(json.dumps([scene.__name__, scene(its_port, rank, size)]), flush=True)


if __name__ == "__main__":
    main()
