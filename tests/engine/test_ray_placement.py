"""Where Ray should put ranks and replicas, and which GPU is whose: decisions, without Ray."""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest

from rollout.config import EngineConfig
from rollout.distributed.placement import Node, ProcessPlace, Reservation, spread_over
from rollout.distributed.ray_runtime import runtime_environment
from rollout.engine.executors.ray import check_places, reservation
from rollout.engine.executors.ray_rank import device_in_actor
from rollout.errors import ConfigError


@pytest.mark.parametrize(
    ("configured", "gpu_ids", "visible", "device"),
    [
        ("auto", (), None, "cpu"),
        ("auto", (), "", "cpu"),
        ("cpu", ("3",), "3", "cpu"),
        ("auto", ("3",), "3", "cuda:0"),  # As Ray sets it: the rank sees its own GPU alone.
        ("cuda", ("3",), "3", "cuda:0"),
        ("cuda", ("3",), None, "cuda:3"),  # Ray was told to leave the variable alone.
        ("cuda", ("3",), "1,3,5", "cuda:1"),  # So it was, and the machine shows some GPUs only.
        ("cuda", ("0",), "GPU-5a,GPU-7c", "cuda:0"),  # By other names than Ray's.
        ("cuda:1", ("3",), "3", "cuda:1"),
    ],
)
def test_a_rank_finds_its_gpu_whatever_is_visible(
    configured: str, gpu_ids: tuple[str, ...], visible: str | None, device: str
) -> None:
    assert device_in_actor(configured, gpu_ids, visible) == device


def test_a_rank_that_must_have_a_gpu_and_was_given_none_says_so() -> None:
    with pytest.raises(ConfigError, match="ray_num_gpus"):
        device_in_actor("cuda", (), "0")


def place(node: str = "node-a", *gpus: str) -> ProcessPlace:
    return ProcessPlace(node_id=node, ip="10.0.0.1", machine="m", gpu_ids=gpus, pid=1)


def config(**fields: Any) -> EngineConfig:
    return EngineConfig(model_path="m", **fields)


def test_ranks_on_several_nodes_or_on_one_gpu_are_refused() -> None:
    check_places([place(), place()], config())
    check_places([place("node-a", "0"), place("node-a", "1")], config())
    with pytest.raises(ConfigError, match="on one node: got 2"):
        check_places([place("node-a"), place("node-b")], config(ray_placement_group="mine"))
    with pytest.raises(ConfigError, match="got GPU 0 for several of 2 ranks"):
        check_places([place("node-a", "0"), place("node-a", "0")], config())


def test_ranks_on_a_cpu_ask_for_no_gpu_and_shares_stay_shares() -> None:
    wanted = reservation(config(device="cpu", tp_size=3, ray_num_cpus=0.5))
    assert wanted.bundle == {"CPU": 0.5} and wanted.total == {"CPU": 1.5}
    wanted = reservation(config(device="cuda", tp_size=2))
    assert wanted.bundle == {"CPU": 1.0, "GPU": 1.0}
    wanted = reservation(config(device="cuda", ray_num_gpus=0.25, ray_num_cpus=0.0))
    assert wanted.bundle == {"GPU": 0.25}
    with pytest.raises(ConfigError, match="ray_num_cpus: got -1"):
        reservation(config(device="cpu", ray_num_cpus=-1))


def test_replicas_go_to_the_nodes_that_hold_the_fewest_and_are_large_enough() -> None:
    nodes = [
        Node(node_id="a", resources={"CPU": 8.0}),
        Node(node_id="b", resources={"CPU": 8.0, "GPU": 4.0}),
        Node(node_id="c", resources={"CPU": 2.0, "GPU": 8.0}),
    ]
    total = Reservation(num_processes=2, num_cpus=1.0, num_gpus=0.0).total
    assert spread_over(nodes, [], total) == ["a", "b", "c"]
    assert spread_over(nodes, ["a", "b", "a"], total) == ["c", "b", "a"]
    on_gpu = Reservation(num_processes=4, num_cpus=1.0, num_gpus=1.0).total
    assert spread_over(nodes, [], on_gpu) == ["b"]


def test_workers_need_nothing_where_the_package_is_installed_and_else_the_drivers_path(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert runtime_environment() is None  # The tests run where it is installed.
    plain = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
    monkeypatch.setattr(sys, "meta_path", plain)
    monkeypatch.setattr(sys, "path", ["", "/a/checkout"])
    variables = {"PYTHONPATH": f"{os.getcwd()}{os.pathsep}/a/checkout"}
    assert runtime_environment() == {"env_vars": variables}
