"""OpenRLHF's calls through Ray, as `examples/openrlhf_engines.py` makes them, and actors that find no room."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ray_cluster import free_cpus, ray_cluster

from trainers_integration.demo.config import ModelConfig
from trainers_integration.demo.model import build_model, save_checkpoint
from trainers_integration.demo.tokenizer import build_tokenizer
from trainers_integration.openrlhf.engines import create_engines
from weight_sync.errors import DeadlineExceeded

CPUS = 3


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with ray_cluster(num_nodes=1, cpus_per_node=CPUS) as cluster:
        yield cluster


@pytest.mark.timeout(600)
def test_two_engines_follow_a_trainer_tensor_by_tensor(cluster: Any, tmp_path: Path) -> None:
    model = build_model(ModelConfig(hidden_size=32, num_layers=2), seed=0)
    save_checkpoint(tmp_path, model, build_tokenizer())
    result = subprocess.run(
        [sys.executable, "examples/openrlhf_engines.py", str(tmp_path)],
        env={**os.environ, "RAY_ADDRESS": cluster.address},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert result.returncode == 0, result.stderr
    pattern = r"16 samples, .* at most (\S+), the step moved it by (\S+)"
    found = [tuple(map(float, pair)) for pair in re.findall(pattern, result.stdout)]
    assert len(found) == 3, result.stdout
    # Weights that did not arrive would show as what the step before has moved.
    assert max(gap for gap, _ in found) < 1e-4
    assert min(moved for _, moved in found) > 1e-2


def test_engines_that_find_no_room_are_given_up(
    cluster: Any, tiny_checkpoint: Callable[..., Path]
) -> None:
    with pytest.raises(DeadlineExceeded, match=r"2 engines of OpenRLHF.*ray status"):
        create_engines(
            2,
            str(tiny_checkpoint("qwen3")),
            ray_options=[{"num_cpus": 1}, {"num_cpus": CPUS + 1}],
            ready_timeout_s=20,
            kv_cache_bytes=1 << 20,
        )
    assert free_cpus(CPUS)
