"""Every query sees exactly the keys that it should, whatever the mixture, the window and the limits."""

from __future__ import annotations

from itertools import count

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.runner.forward_batch import AttentionPlanner, ForwardBatch, GroupLimits
from rollout.sampling_params import SamplingParams
from rollout.scheduling.batch import ScheduledItem
from rollout.scheduling.request import Request

CHUNKS = st.lists(
    st.tuples(st.sampled_from([0, 0, 1, 3, 4, 9, 17]), st.sampled_from([1, 1, 1, 2, 4, 5, 11])),
    min_size=1,
    max_size=9,
)
LIMITS = st.builds(
    GroupLimits,
    max_blocks=st.integers(1, 40),
    max_padding_blocks=st.integers(0, 20),
    max_queries=st.integers(1, 60),
)


def make_items(chunks, block_size):
    """Items whose token ids and blocks are all different."""
    tokens, blocks = count(1000), count(7)
    items = []
    for number, (start, length) in enumerate(chunks):
        ids = [next(tokens) for _ in range(start + length + 2)]
        request = Request(rid=str(number), prompt_ids=ids, params=SamplingParams())
        request.block_ids = [next(blocks) for _ in range(-(-len(ids) // block_size))]
        items.append(ScheduledItem(request=request, start=start, length=length, samples=True))
    return items


def slot_of(request, position, block_size):
    return request.block_ids[position // block_size] * block_size + position % block_size


def visible_slots(group, block_size):
    """For each row of a group: the flat cache slots that its query sees, in order."""
    slots = (group.blocks[:, None] * block_size + torch.arange(block_size)).view(group.batch, -1)
    slots = slots[:, : group.kv_len]
    padded = group.batch * group.query_len
    if group.mask is None:
        seen = torch.ones(group.query_len, group.kv_len).tril().bool().repeat(group.batch, 1)
    else:
        assert group.mask.shape == (group.batch, 1, group.query_len, group.kv_len)
        seen = (group.mask == 0).view(padded, group.kv_len)
    real = range(padded) if group.real_rows is None else group.real_rows.tolist()
    return [slots[i // group.query_len][seen[i]].tolist() for i in real]


@settings(max_examples=150, deadline=None)
@given(CHUNKS, st.sampled_from([1, 2, 4]), st.sampled_from([None, 1, 3, 8]), LIMITS)
def test_queries_see_their_own_past_within_the_window(chunks, block_size, window, limits):
    items = make_items(chunks, block_size)
    batch = ForwardBatch.of(items, block_size)
    planner = AttentionPlanner(batch, window, block_size, limits)
    groups = planner.groups(torch.float32, torch.device("cpu"))

    rows = [row for group in groups for row in range(group.first_row, group.last_row)]
    assert rows == list(range(len(batch.token_ids)))
    seen = [slots for group in groups for slots in visible_slots(group, block_size)]
    in_item_order = iter(batch.item_rows.tolist())
    for item in items:
        for position in range(item.start, item.end):
            row = next(in_item_order)
            assert batch.token_ids[row] == item.request.token_ids[position]
            assert batch.positions[row] == position
            assert batch.slots[row] == slot_of(item.request, position, block_size)
            first = 0 if window is None else max(0, position - window + 1)
            expected = [slot_of(item.request, p, block_size) for p in range(first, position + 1)]
            assert seen[row] == expected


@settings(max_examples=100, deadline=None)
@given(CHUNKS, LIMITS)
def test_groups_keep_to_their_limits(chunks, limits):
    block_size = 2
    planner = AttentionPlanner(
        ForwardBatch.of(make_items(chunks, block_size), block_size), None, block_size, limits
    )
    for group in planner.groups(torch.float32, torch.device("cpu")):
        if group.batch > 1:
            assert len(group.blocks) <= limits.max_blocks
            assert group.query_len == 1 or group.batch * group.query_len <= limits.max_queries


@given(CHUNKS)
def test_blocks_that_a_step_begins_and_does_not_fill_are_cleared(chunks):
    items = make_items(chunks, 4)
    expected = {
        item.request.block_ids[(item.end - 1) // 4]
        for item in items
        if item.end % 4 and (item.end - 1) // 4 * 4 >= item.start
    }
    assert set(ForwardBatch.of(items, 4).partial_blocks.tolist()) == expected


def test_many_short_prompts_are_one_group():
    items = make_items([(0, 8 + number % 5) for number in range(300)], 4)
    limits = GroupLimits(max_blocks=10_000, max_padding_blocks=1_000, max_queries=10_000)
    batch = ForwardBatch.of(items, 4)
    [group] = AttentionPlanner(batch, None, 4, limits).groups(torch.float32, torch.device("cpu"))
    assert (group.batch, group.query_len, group.mask) == (300, 12, None)
    assert np.array_equal(np.sort(batch.item_rows), np.arange(batch.token_ids.size))
