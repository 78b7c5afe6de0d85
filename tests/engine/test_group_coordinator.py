"""Ranks in processes of their own: collectives, objects, rendezvous, and ranks that do not come or die."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from rollout.distributed.group_coordinator import GroupCoordinator
from rollout.distributed.stateless_process_group import StatelessProcessGroup
from weight_sync.errors import DeadlineExceeded, TransportError
from weight_sync.process_groups.rendezvous import StoreServer

SIZE = 3
VICTIM = 1
"""The rank that dies in the last scene."""


Scenes = dict[str, list[dict[str, Any]]]
"""What each rank saw in each scene; nothing from a rank that died in it."""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    """All scenes, played once; this process serves the store, as a launcher does."""
    server = StoreServer()
    script = Path(__file__).with_name("group_coordinator_rank.py")
    ports = [str(server.port), str(free_port())]
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), *ports, str(rank), str(SIZE)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(SIZE)
    ]
    found: Scenes = {}
    try:
        for rank, process in enumerate(ranks):
            output, errors = process.communicate(timeout=600)
            expected = -signal.SIGKILL if rank == VICTIM else 0
            assert process.returncode == expected, errors.decode()[-3000:]
            for line in output.splitlines():
                name, seen = json.loads(line)
                found.setdefault(name, []).append(seen)
    finally:
        for process in ranks:
            process.kill()
        server.close()
    return found


@pytest.fixture
def collectives(scenes: Scenes) -> list[dict[str, Any]]:
    return scenes["collectives"]


def expected_tensors() -> list[torch.Tensor]:
    return [torch.arange(6.0).reshape(2, 3) + 100 * rank for rank in range(SIZE)]


def test_collectives_do_what_their_names_say(collectives):
    tensors = expected_tensors()
    for rank, result in enumerate(collectives):
        assert result["place"] == [rank, SIZE, SIZE]
        assert result["all_reduce"] == sum(tensors).tolist()
        assert result["all_gather_last"] == torch.cat(tensors, dim=-1).tolist()
        assert result["all_gather_0"] == torch.cat(tensors, dim=0).tolist()
        assert result["gather"] == (torch.cat(tensors, dim=0).tolist() if rank == 1 else None)
        assert result["broadcast"] == result["filled"] == [2.0] * 3
    assert collectives[2]["received"] == [0, 1, 2, 3]


def test_tensors_of_any_dtype_and_stride_may_travel(collectives):
    for result in collectives:
        assert result["all_gather_bool"] == [False, True, False]
        assert result["all_gather_float8"] == [0.0, 1.0, 2.0]
        assert result["all_reduce_strided"] == (3 * torch.arange(6.0).reshape(2, 3).t()).tolist()
        assert result["in_place"] is True


def test_a_sum_has_the_same_bits_on_every_rank(collectives):
    assert len({tuple(result["all_reduce_bits"]) for result in collectives}) == 1


def test_a_destroyed_group_refuses_calls(collectives):
    for result in collectives:
        assert result["after"]["kind"] == "TransportError"
        assert "after it was destroyed" in result["after"]["message"]


def test_objects_travel_typed_and_whatever_their_size(scenes):
    results = scenes["objects"]
    for rank, result in enumerate(results):
        assert result["sizes"] == [0, 4050, 4096, 100_000]
        assert result["dict"] == {
            "half": ["torch.bfloat16", [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]],
            "step": 7,
            "scalar": ["torch.int64", 5],
            "none": None,
            "empty": ["torch.float32", []],
            "names": ["a", "b"],
        }
        assert result["wrong"]["kind"] == ("" if rank == 0 else "ProtocolError")
        assert result["late"]["kind"] == ("" if rank == 0 else "DeadlineExceeded")
        assert rank == 0 or 0.2 < result["late"]["seconds"] < 3.9
    assert results[0]["received"] == {"k": [1, None, "x"]}


def test_several_groups_live_side_by_side_with_and_without_a_default_group(scenes):
    first, second, third = (result["sums"] for result in scenes["several"])
    assert first == third == [3.0, 3.0, 3.0, 2.0, 3.0]
    assert second == [3.0, 3.0, 3.0, 3.0]


def test_a_store_carries_small_messages_and_forgets_them(scenes):
    for rank, result in enumerate(scenes["stores"]):
        assert result["gathered"] == [[f"{r}:{i}" for r in range(SIZE)] for i in range(3)]
        assert result["told"] == "00ff"
        assert rank == 0 or result["waited_s"] > 0.2
        assert result["keys"][1] <= result["keys"][0] + 70  # 150 broadcasts later
        assert result["again"]["kind"] == "TransportError"
        assert "a name of its own" in result["again"]["message"]
        if rank != 1:
            assert result["late"]["kind"] == "DeadlineExceeded"
            assert "ranks [1]" in result["late"]["message"]
            assert "after it broke" in result["after"]["message"]


def test_the_rank_that_serves_the_store_may_leave_first(scenes):
    assert [r["told"] for r in scenes["first_rank_serves"]] == ["last words"] * SIZE


def test_a_rank_that_dies_is_an_error_for_the_others_and_no_hang(scenes):
    survivors = scenes["killed"]
    assert len(survivors) == SIZE - 1
    for result in survivors:
        assert result["error"]["kind"] in ("TransportError", "DeadlineExceeded")
        assert result["error"]["seconds"] < 30


def test_a_rank_that_never_comes_is_named_by_the_deadline():
    server = StoreServer()
    started = time.monotonic()
    with pytest.raises(DeadlineExceeded, match=r"ranks \[1, 2\]"):
        StatelessProcessGroup.create(
            "127.0.0.1", server.port, 0, SIZE, name="x", timeout_s=0.4, served=True
        )
    assert time.monotonic() - started < 20
    server.close()


def test_a_place_outside_the_group_is_refused():
    with pytest.raises(TransportError, match="0 <= rank < world size"):
        StatelessProcessGroup.create("127.0.0.1", 1, 3, 3, name="x")


def test_one_rank_needs_nobody():
    class Command(msgspec.Struct):
        step: int

    with StatelessProcessGroup.create("127.0.0.1", 0, 0, 1, name="alone") as meeting:
        assert meeting.all_gather_bytes(b"x") == [b"x"]
        group = GroupCoordinator.create(meeting)
    tensor = torch.ones(2)
    for same in (
        group.all_reduce(tensor),
        group.all_gather(tensor, dim=0),
        group.gather(tensor),
        group.broadcast(tensor),
        group.broadcast_tensor_dict({"x": tensor})["x"],
    ):
        assert same is tensor
    assert group.broadcast_object(Command(step=1), Command).step == 1
    group.barrier()
    with pytest.raises(TransportError, match="another rank"):
        group.send(tensor, 0)
    assert (group.rank, group.size, group.world_size) == (0, 1, 1)
    group.destroy()
