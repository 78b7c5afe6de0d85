"""What the host keeps for decode steps: block tables by row, shared prefixes, sizes of graphs."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rollout.runner.block_tables import HostBlockTables
from rollout.runner.staging import PinnedRing, Staging
from rollout.sampling_params import SamplingParams
from rollout.scheduling.request import Request
from rollout_kernels.attention_configs import SharedConfig
from rollout_kernels.shared_prefixes import SharedPrefixes


def make_request(number: int, blocks: list[int]) -> Request:
    request = Request(rid=str(number), prompt_ids=[1], params=SamplingParams())
    request.block_ids = blocks
    return request


def test_tables_follow_growth_retraction_and_comings_and_goings():
    rng = random.Random(0)
    tables = HostBlockTables(max_rows=5, width=12)
    requests = [make_request(number, [number]) for number in range(20)]
    for _ in range(300):
        for request in requests:
            if rng.random() < 0.1:  # retracted and admitted again
                request.block_ids = [rng.randrange(99) for _ in range(rng.randint(1, 12))]
            elif len(request.block_ids) < 12 and rng.random() < 0.5:
                request.block_ids.append(rng.randrange(99))
        batch = rng.sample(requests, rng.randint(1, 5))
        rows = tables.rows(batch)
        assert len(set(rows.tolist())) == len(batch)
        gathered = tables.gather(rows, 12)
        for request, row in zip(batch, gathered, strict=True):
            assert row[: len(request.block_ids)].tolist() == request.block_ids


def test_growth_is_no_reset_and_other_blocks_are():
    tables = HostBlockTables(max_rows=2, width=4)
    request = make_request(0, [7])
    tables.rows([request])
    before = tables.num_resets
    request.block_ids.append(8)
    tables.rows([request])
    assert tables.num_resets == before
    request.block_ids = [7, 8]
    tables.rows([request])
    assert tables.num_resets == before + 1


def test_graphs_are_made_for_sizes_that_waste_little():
    pytest.importorskip("triton")
    from rollout.runner.cuda_graph_runner import batch_sizes_to_capture

    for largest in (1, 3, 8, 100, 256, 1000):
        sizes = batch_sizes_to_capture(largest)
        assert sizes == sorted(set(sizes)) and sizes[-1] == largest
        for batch in range(1, largest + 1):
            padded = next(size for size in sizes if size >= batch)
            assert padded - batch < max(8, batch / 4)
    assert len(batch_sizes_to_capture(512)) <= 32


def test_a_step_uploads_all_its_arrays_at_once_each_where_kernels_want_it():
    staging = Staging(torch.device("cpu"))
    arrays = [
        np.arange(3, dtype=np.int32),
        np.array([True, False]),
        np.arange(5, dtype=np.int64),
        np.zeros((0, 4), np.float32),
        np.arange(6, dtype=np.float32).reshape(2, 3).T,
    ]
    into = torch.zeros(256, dtype=torch.uint8)
    for target in (None, into):
        tensors = staging.upload(arrays, into=target)
        for array, tensor in zip(arrays, tensors, strict=True):
            assert torch.equal(tensor, torch.from_numpy(array.copy()))
            if tensor.numel():
                assert (tensor.data_ptr() - tensors[0].data_ptr()) % 16 == 0


def test_a_buffer_that_is_too_small_is_replaced():
    ring = PinnedRing(torch.device("cpu"))
    small = ring.take(10)
    ring.give_back(small)
    assert ring.take(1 << 20).numel() >= 1 << 20


@pytest.mark.parametrize("deterministic", [False, True])
def test_prefixes_are_cut_into_tiles_of_the_launch_that_reads_them(
    monkeypatch: pytest.MonkeyPatch, deterministic: bool
) -> None:
    """A deterministic one has a shape of its own: members beyond its rows would be left out."""
    shared = pytest.importorskip("rollout_kernels.shared_prefix_decode")
    from rollout.runner.shared_prefixes import PrefixFinder

    def shared_config(device: torch.device, *, deterministic: bool, **_: object) -> SharedConfig:
        return SharedConfig(rows=32 if deterministic else 64, keys=32, warps=2, stages=2)

    monkeypatch.setattr(shared, "shared_config", shared_config)
    layer = SimpleNamespace(head_dim=64, num_heads=8, num_kv_heads=4)
    context: Any = SimpleNamespace(
        model=SimpleNamespace(attention_layer=layer),
        config=SimpleNamespace(sliding_windows=[None]),
        device=torch.device("cpu"),
        dtype=torch.bfloat16,
        block_size=64,
        deterministic=deterministic,
    )
    requests = [make_request(number, [7, 8, number]) for number in range(32)]
    found = PrefixFinder(context, True).find(requests, np.full(32, 130, np.int32), 32, 0)
    tiles = SharedPrefixes.views(torch.from_numpy(found.numbers), 32).tiles
    assert found.pays and int(tiles[:, 1].sum()) == 32
    assert int(tiles[:, 1].max()) == (32 if deterministic else 64) // 2
