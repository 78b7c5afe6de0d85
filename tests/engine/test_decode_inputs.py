"""What the host keeps for decode steps: block tables by row, shared prefixes, sizes of graphs."""

from __future__ import annotations

import gc
import itertools
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rollout.runner.block_tables import HostBlockTables
from rollout.runner.staging import PinnedRing, Staging
from rollout.sampling_params import SamplingParams
from rollout.scheduling.request import Request


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

    for largest, least in itertools.product((1, 3, 8, 100, 256, 1000), (1, 8)):
        sizes = batch_sizes_to_capture(largest, least)
        assert (
            sizes[0] == min(least, largest) and sizes == sorted(set(sizes)) and sizes[-1] == largest
        )
        for batch in range(1, largest + 1):
            padded = next(size for size in sizes if size >= batch)
            assert padded - batch < max(8, batch / 4)
    assert batch_sizes_to_capture(100)[:5] == [1, 2, 4, 8, 16]
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


def test_a_buffer_is_not_written_before_the_device_has_read_it():
    class Event:
        done = False

        def query(self):
            return self.done

    ring, event = PinnedRing(torch.device("cpu")), Event()
    under_way = ring.take(10)
    ring._free.append((under_way, event))
    other = ring.take(10)
    assert other.data_ptr() != under_way.data_ptr()
    event.done = True
    assert ring.take(10) is under_way


def test_shared_prefixes_are_looked_for_again_when_somebody_has_other_blocks():
    """Whoever was retracted and came back may be in the same place of the same batch, with other blocks."""
    pytest.importorskip("triton")
    from rollout.runner.shared_prefixes import PrefixFinder

    layer = SimpleNamespace(head_dim=64, num_heads=4, num_kv_heads=2)
    context = SimpleNamespace(
        model=SimpleNamespace(attention_layer=layer),
        config=SimpleNamespace(sliding_windows=(None,)),
        block_size=16,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    finder, tables = PrefixFinder(context, True), HostBlockTables(max_rows=4, width=64)
    common = list(range(40))
    requests = [make_request(number, [*common, 50 + number]) for number in range(3)]
    positions = np.full(3, 40 * 16 + 5, np.int32)

    def look(positions):
        tables.rows(requests)
        return finder.find(requests, positions, 4, tables.num_resets)

    first = look(positions)
    assert first.pays and look(positions + 1).numbers is first.numbers
    requests[1].block_ids = list(range(100, 141))
    again = look(positions)
    assert again.pays and not np.array_equal(again.numbers, first.numbers)
    assert (
        again.numbers.tolist()
        == PrefixFinder(context, True).find(requests, positions, 4, 0).numbers.tolist()
    )
    requests[2].block_ids = list(range(200, 241))
    assert not look(positions).pays


def test_garbage_that_was_frozen_before_a_capture_stays_so():
    pytest.importorskip("triton")
    from rollout.runner.cuda_graph_runner import frozen_gc

    before = gc.get_freeze_count()
    with frozen_gc():
        assert not gc.isenabled() and gc.get_freeze_count() > before
    assert gc.isenabled() and gc.get_freeze_count() == before
    gc.freeze()
    try:
        with frozen_gc():
            pass
        assert gc.isenabled() and gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()
