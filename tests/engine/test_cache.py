"""KV bookkeeping: blocks, shared prefixes, versions."""

from __future__ import annotations

import pytest

from rollout.cache import BlockAllocator, CachedSequence, KVCacheManager
from rollout.cache.kv_cache_manager import BROKEN_CHAIN
from rollout.cache.prefix_cache import ROOT_UID, root_of


def make_kv(num_blocks: int = 8, block_size: int = 4, **options: bool) -> KVCacheManager:
    return KVCacheManager(num_blocks=num_blocks, block_size=block_size, **options)


def run(
    kv: KVCacheManager, tokens: list[int], limit: int | None = None, root_uid: int = ROOT_UID
) -> CachedSequence:
    """A sequence that is admitted and computed to its end."""
    sequence = CachedSequence(tokens, root_uid)
    admit(kv, sequence, limit)
    compute(kv, sequence)
    return sequence


def admit(kv: KVCacheManager, sequence: CachedSequence, limit: int | None = None) -> None:
    length = len(sequence.token_ids)
    hits = kv.match(sequence, length - 1 if limit is None else limit)
    before, cost = kv.num_available, kv.cost(hits, length)
    kv.admit(sequence, hits, length)
    assert kv.num_available == before - cost


def compute(kv: KVCacheManager, sequence: CachedSequence, length: int | None = None) -> None:
    start = sequence.num_computed
    end = len(sequence.token_ids) if length is None else start + length
    sequence.num_computed = end
    kv.commit(sequence, start, end)


def test_a_released_prefix_is_found_again_and_its_last_token_is_not() -> None:
    kv = make_kv()
    first = run(kv, list(range(8)))
    blocks = first.block_ids
    kv.release(first)
    assert kv.num_available == 8 and first.block_ids == [] and first.num_computed == 0
    second = CachedSequence(range(8))
    admit(kv, second)
    assert second.block_ids[0] == blocks[0] and second.num_computed == 4
    third = CachedSequence(range(9))
    admit(kv, third)
    assert third.block_ids[:2] == blocks and third.num_computed == 8
    kv.check_invariants([second, third])


def test_a_prefix_is_shared_while_its_first_owner_still_runs() -> None:
    kv = make_kv()
    first = run(kv, list(range(10)))
    second = run(kv, list(range(9)))
    assert second.block_ids[:2] == first.block_ids[:2]
    assert second.block_ids[2] != first.block_ids[2]
    assert kv.num_held == 4
    kv.check_invariants([first, second])


def test_equal_blocks_after_different_prefixes_are_different() -> None:
    kv = make_kv()
    run(kv, [1, 1, 1, 1, 5, 5, 5, 5, 0])
    other = CachedSequence([2, 2, 2, 2, 5, 5, 5, 5, 0])
    assert kv.match(other, 8) == []
    assert kv.match(CachedSequence([5, 5, 5, 5, 0]), 4) == []


def test_prefixes_are_shared_within_a_salt_alone() -> None:
    kv = make_kv()
    kv.release(run(kv, list(range(12)), root_uid=root_of("a")))
    for salt, num in (("a", 2), ("b", 0), ("", 0)):
        assert len(kv.match(CachedSequence(range(12), root_of(salt)), 11)) == num
    kv.release(run(kv, list(range(12)), root_uid=root_of("b")))
    found = [kv.match(CachedSequence(range(12), root_of(salt)), 11) for salt in ("a", "b")]
    assert not set(found[0]) & set(found[1])
    kv.check_invariants([])


def test_the_root_of_a_salt_is_nobody_elses() -> None:
    salts = ["", "a", "b", "A", "\ud800", "a" * 512]
    roots = [root_of(salt) for salt in salts]
    assert roots[0] == ROOT_UID and len(set(roots)) == len(salts)
    assert all(root < BROKEN_CHAIN for root in roots[1:])
    pairs = [
        ("b", "a"),
        ("a", "b"),
        ("ab", ""),
        ("", "ab"),
        ("1 ab", ""),
        ("2 ab", ""),
        ("0 ab", ""),
    ]
    assert len({root_of(salt, rows) for salt, rows in pairs}) == len(pairs)


def test_two_that_compute_the_same_block_at_once_share_what_follows() -> None:
    kv = make_kv()
    twins = [CachedSequence(range(8)), CachedSequence(range(8))]
    for twin in twins:
        admit(kv, twin)
    for length in (4, 4):
        for twin in reversed(twins):
            compute(kv, twin, length)
    assert kv.match(CachedSequence([4, 5, 6, 7, 0]), 4) == []
    first, second = twins[1].block_ids
    kv.release(twins[0])
    assert kv.match(CachedSequence(range(9)), 8) == [first, second]
    kv.release(twins[1])
    assert kv.match(CachedSequence(range(9)), 8) == [first, second]
    kv.check_invariants([])


def test_nothing_is_reused_beyond_the_limit() -> None:
    kv = make_kv()
    run(kv, list(range(12)))
    sequence = CachedSequence(range(12))
    assert [len(kv.match(sequence, limit)) for limit in (0, 3, 4, 7, 8, 11)] == [0, 0, 1, 1, 2, 2]


def test_the_end_of_a_prefix_is_evicted_before_its_beginning() -> None:
    kv = make_kv(num_blocks=4)
    kv.release(run(kv, list(range(12))))
    taker = run(kv, [9] * 8)
    assert len(kv.match(CachedSequence(range(12)), 11)) == 2
    kv.release(taker)
    kv.release(run(kv, [8] * 16))
    assert kv.match(CachedSequence(range(12)), 11) == []
    kv.check_invariants([])


def test_the_least_recently_used_prefix_is_evicted_first() -> None:
    kv = make_kv(num_blocks=3)
    for first in (1, 2, 3):
        kv.release(run(kv, [first] * 4))
    kv.release(run(kv, [1] * 4, limit=4))  # used again
    kv.release(run(kv, [7] * 4))
    hits = [len(kv.match(CachedSequence([first] * 4), 4)) for first in (1, 2, 3, 7)]
    assert hits == [1, 0, 1, 1]


def test_a_block_whose_prefix_was_evicted_is_not_found() -> None:
    kv = make_kv(num_blocks=4)
    long = run(kv, list(range(8)))
    beginning, end = long.block_ids
    kv.release(long)
    again = run(kv, list(range(8)), limit=8)
    # Only the beginning is given up, by hand: release never leaves an end without its beginning.
    kv.release(again)
    kv._prefixes.set_held(end)
    assert kv._prefixes.evict() == beginning
    kv._prefixes.set_idle(end)
    kv._allocator.free(beginning)
    renewed = run(kv, [0, 1, 2, 3])
    assert len(kv.match(CachedSequence(range(8)), 8)) == 1
    kv.check_invariants([renewed])


def test_another_version_never_finds_old_kv() -> None:
    kv = make_kv()
    kv.release(run(kv, list(range(9))))
    kv.set_weight_version(1)
    assert kv.match(CachedSequence(range(9)), 8) == []
    kv.release(run(kv, list(range(9))))
    assert len(kv.match(CachedSequence(range(9)), 8)) == 2
    # Rolled back, tried again: the same number may mean other weights.
    kv.set_weight_version(0)
    assert kv.match(CachedSequence(range(9)), 8) == []
    kv.set_weight_version(1)
    assert kv.match(CachedSequence(range(9)), 8) == []
    kv.check_invariants([])


def test_a_sequence_of_two_versions_is_neither_registered_nor_forked() -> None:
    kv = make_kv()
    sequence = CachedSequence(range(12))
    admit(kv, sequence)
    compute(kv, sequence, 6)
    assert kv.can_fork(sequence)
    kv.set_weight_version(1)
    assert not kv.can_fork(sequence)
    compute(kv, sequence)
    assert not kv.can_fork(sequence)
    versions = [kv.versions_of(block) for block in sequence.block_ids]
    assert versions == [(0, 0), (0, 1), (1, 1)]
    assert kv.match(CachedSequence(range(12)), 12) == []
    kv.check_invariants([sequence])
    kv.release(sequence)
    assert kv.num_available == 8 and kv.match(CachedSequence(range(12)), 12) == []


def test_a_fork_shares_full_blocks_and_copies_the_partial_one() -> None:
    kv = make_kv()
    parent, child = run(kv, list(range(10))), CachedSequence(range(10))
    kv.fork(parent, child)
    assert child.block_ids[:2] == parent.block_ids[:2] and child.num_computed == 10
    assert kv.take_copies() == [(parent.block_ids[2], child.block_ids[2])]
    assert kv.take_copies() == []
    child.token_ids += [77, 78]
    compute(kv, child, 2)
    kv.check_invariants([parent, child])
    kv.release(parent)
    assert len(kv.match(CachedSequence([*range(10), 77, 78]), 12)) == 3


def test_a_fork_at_a_block_boundary_copies_nothing() -> None:
    kv = make_kv()
    parent, child = run(kv, list(range(8))), CachedSequence(range(8))
    kv.fork(parent, child)
    assert child.block_ids == parent.block_ids and kv.take_copies() == []
    assert child.capacity == 8
    kv.extend(child)
    assert child.capacity == 12 and kv.num_held == 3
    kv.check_invariants([parent, child])


def test_a_fork_that_is_released_at_once_leaves_no_copy_behind() -> None:
    kv = make_kv(num_blocks=4)
    parent, child, other = run(kv, list(range(6))), CachedSequence(range(6)), CachedSequence([5])
    kv.fork(parent, child)
    kv.release(child)
    admit(kv, other)
    assert kv.take_copies() == []
    kv.check_invariants([parent, other])


def test_a_source_that_is_released_is_still_copied() -> None:
    kv = make_kv(num_blocks=4)
    parent, child = run(kv, list(range(6))), CachedSequence(range(6))
    source = parent.block_ids[1]
    kv.fork(parent, child)
    kv.release(parent)
    kv.check_invariants([child])
    assert kv.take_copies() == [(source, child.block_ids[1])]


def test_a_flush_forgets_content_but_takes_no_block_away() -> None:
    kv = make_kv()
    idle, running = run(kv, [1] * 8), run(kv, [2] * 8)
    kv.release(idle)
    kv.flush()
    assert kv.num_held == 2 and kv.num_available == 6
    assert kv.match(CachedSequence([1] * 9), 8) == kv.match(CachedSequence([2] * 9), 8) == []
    running.token_ids += [2] * 4
    kv.extend(running)
    compute(kv, running)
    assert kv.match(CachedSequence([2] * 13), 12) == []
    kv.check_invariants([running])


def test_without_a_prefix_cache_nothing_is_found_but_forks_still_share() -> None:
    kv = make_kv(enable_prefix_cache=False)
    parent, child = run(kv, list(range(8))), CachedSequence(range(8))
    assert kv.match(CachedSequence(range(9)), 8) == []
    kv.fork(parent, child)
    assert child.block_ids == parent.block_ids
    kv.release(parent)
    kv.release(child)
    assert kv.num_available == 8
    kv.check_invariants([])


def test_a_pool_without_blocks_or_a_block_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="got 0 blocks, expected at least 1"):
        BlockAllocator(0)
    with pytest.raises(ValueError, match="block_size: got 0"):
        make_kv(block_size=0)


def test_a_block_that_is_released_twice_is_noticed() -> None:
    allocator = BlockAllocator(2)
    block = allocator.allocate()
    assert allocator.release(block)
    with pytest.raises(AssertionError, match="once too often"):
        allocator.release(block)


def test_the_invariant_check_notices_a_lost_and_a_stolen_block() -> None:
    kv = make_kv()
    sequence = run(kv, list(range(6)))
    with pytest.raises(AssertionError, match="reference counts"):
        kv.check_invariants([])
    kv._allocator.free(sequence.block_ids[0])
    with pytest.raises(AssertionError, match="free or idle"):
        kv.check_invariants([sequence])
