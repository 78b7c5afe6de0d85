"""Which sequences of a batch share a prefix of their block tables, and how it is told to the kernel."""

from __future__ import annotations

import random
import time

from rollout_kernels.shared_prefixes import (
    SharedPrefix,
    find_shared_prefixes,
    max_tiles,
    num_numbers,
    packed,
)


def tables_of(*prefixes: tuple[int, ...], own: int = 3) -> list[tuple[int, ...]]:
    """A block table for each prefix, with blocks of its own after it."""
    return [
        (*prefix, *range(1000 + 10 * n, 1000 + 10 * n + own)) for n, prefix in enumerate(prefixes)
    ]


def test_samples_of_a_prompt_are_a_group():
    one, other = tuple(range(8)), tuple(range(100, 112))
    tables = tables_of(one, other, one, (), other, one)
    assert find_shared_prefixes(tables, block_size=16) == [
        SharedPrefix(rows=(0, 2, 5), num_blocks=8),
        SharedPrefix(rows=(1, 4), num_blocks=12),
    ]


def test_shared_keys_are_whole_tiles():
    tables = tables_of(tuple(range(7)), tuple(range(7)))
    assert find_shared_prefixes(tables, block_size=16) == [SharedPrefix(rows=(0, 1), num_blocks=4)]
    tables = tables_of((1, 2, 3), (1, 2, 3))
    assert find_shared_prefixes(tables, block_size=16) == []
    assert find_shared_prefixes(tables, block_size=256) == [SharedPrefix(rows=(0, 1), num_blocks=3)]


def test_short_prefixes_do_not_pay():
    tables = tables_of(tuple(range(8)), tuple(range(8)))
    assert find_shared_prefixes(tables, block_size=16, min_keys=256) == []


def test_a_common_system_prompt_gives_way_to_longer_prompts_that_save_more():
    system = (1, 2, 3, 4)
    prompts = [(*system, *range(at, at + 8)) for at in (10, 20, 30)]
    tables = tables_of(*(prompt for prompt in prompts for _ in range(4)))
    found = find_shared_prefixes(tables, block_size=16)
    assert [(group.rows, group.num_blocks) for group in found] == [
        ((0, 1, 2, 3), 12),
        ((4, 5, 6, 7), 12),
        ((8, 9, 10, 11), 12),
    ]


def test_a_long_common_prefix_wins_over_short_ends():
    system = tuple(range(40))
    prompts = [(*system, *range(at, at + 4)) for at in (100, 200, 300)]
    tables = tables_of(*(prompt for prompt in prompts for _ in range(2)))
    found = find_shared_prefixes(tables, block_size=16)
    assert found == [SharedPrefix(rows=(0, 1, 2, 3, 4, 5), num_blocks=40)]


def test_every_grouping_is_true_and_packs_into_its_buffer():
    rng = random.Random(1)
    for _ in range(50):
        stems = [[rng.randrange(3) for _ in range(rng.randrange(20))] for _ in range(4)]
        tables = [
            tuple(rng.choice(stems) + [50 + 100 * n + i for i in range(rng.randrange(5))])
            for n in range(rng.randrange(1, 30))
        ]
        groups = find_shared_prefixes(tables, block_size=32)
        rows = [row for group in groups for row in group.rows]
        assert len(rows) == len(set(rows))
        for group in groups:
            assert len(group.rows) > 1 and group.num_blocks % 2 == 0
            assert len({tables[row][: group.num_blocks] for row in group.rows}) == 1
        size = len(tables)
        numbers = packed(groups, max_batch=size, block_size=32, members_per_tile=4)
        assert len(numbers) == num_numbers(size)
        members, lengths, tiles = numbers[:size], numbers[size : 2 * size], numbers[2 * size :]
        done = []
        for first, count, keys in zip(*(iter(tiles),) * 3, strict=True):
            assert count <= 4
            for row in members[first : first + count]:
                assert lengths[row] == keys
                done.append(row)
        assert sorted(done) == sorted(rows)
        assert all(lengths[row] == 0 for row in set(range(size)) - set(rows))


def test_groups_of_three_fit_into_the_tiles_there_are():
    groups = [SharedPrefix(rows=(3 * i, 3 * i + 1, 3 * i + 2), num_blocks=4) for i in range(10)]
    numbers = packed(groups, max_batch=30, block_size=16, members_per_tile=4)
    assert len(numbers) == num_numbers(30) and max_tiles(30) == 15


def test_it_takes_milliseconds_for_hundreds_of_sequences():
    prompts = [tuple(range(100 * p, 100 * p + 32)) for p in range(64)]
    tables = tables_of(*(prompt for prompt in prompts for _ in range(8)), own=16)
    took = []
    for _ in range(5):
        start = time.perf_counter()
        groups = find_shared_prefixes(tables, block_size=16)
        took.append(time.perf_counter() - start)
    assert len(groups) == 64
    assert min(took) < 0.05
    print(min(took))
