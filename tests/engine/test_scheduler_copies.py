"""The scheduler's policy for copies of a prompt that come as requests of their own."""

from __future__ import annotations

from typing import Any

import pytest
from scheduler_support import chunks, make_requests, make_scheduler, step

from rollout.sampling_params import SamplingParams
from rollout.scheduling import Request, Scheduler
from rollout.types import RequestStatus


def make_copies(
    scheduler: Scheduler, prompt: list[int], num: int, n: int = 1, **options: Any
) -> list[Request]:
    """Requests of their own with one prompt, of n samples each; the first sample of each."""
    params = SamplingParams(max_new_tokens=16)
    first = len(scheduler.requests)
    copies = []
    for number in range(first, first + num):
        group = [
            Request(rid=f"c{number}.{i}", prompt_ids=prompt, params=params, **options)
            for i in range(n)
        ]
        scheduler.add(group)
        copies.append(group[0])
    return copies


@pytest.mark.parametrize("n", [1, 2])
def test_copies_of_a_prompt_wait_for_the_first_and_share_its_blocks(n: int) -> None:
    scheduler = make_scheduler(running=16)
    copies = make_copies(scheduler, list(range(10)), 8, n)
    assert chunks(step(scheduler)[0]) == [("c0.0", 0, 10)]
    batch, _ = step(scheduler)
    assert chunks(batch)[n:] == [(f"c{i}.0", 8, 2) for i in range(1, 8)]
    assert [copy.num_cached_tokens for copy in copies] == [0, *[8] * 7]
    assert all(copy.block_ids[:2] == copies[0].block_ids[:2] for copy in copies)


def test_copies_of_a_prompt_in_chunks_wait_for_all_of_them() -> None:
    scheduler = make_scheduler(budget=6)
    copies = make_copies(scheduler, list(range(17)), 3)
    late: list[Request] = []
    for _ in range(3):
        assert {rid for rid, _, _ in chunks(step(scheduler)[0])} == {copies[0].rid}
        late = late or make_copies(scheduler, list(range(17)), 1)
    step(scheduler)
    assert [copy.num_cached_tokens for copy in [*copies, *late]] == [0, 16, 16, 16]


def test_a_prompt_that_shares_a_beginning_waits_for_no_more_than_that() -> None:
    scheduler = make_scheduler(budget=6)
    (long,) = make_requests(scheduler, list(range(40)))
    (other,) = make_requests(scheduler, [*range(8), 99, 98, 97])
    step(scheduler)
    assert scheduler.running == [long]
    for _ in range(6):
        step(scheduler)
    assert other.num_cached_tokens == 8


def test_who_waits_for_a_copy_lets_others_by_but_keeps_its_slot() -> None:
    scheduler = make_scheduler(running=3)
    copies = make_copies(scheduler, list(range(10)), 2)
    strangers = make_requests(scheduler, [50] * 5), make_requests(scheduler, [60] * 5)
    assert [rid for rid, _, _ in chunks(step(scheduler)[0])] == [
        copies[0].rid,
        strangers[0][0].rid,
    ]
    step(scheduler)
    assert scheduler.running == [copies[0], *strangers[0], copies[1]]


@pytest.mark.parametrize("how", ["abort", "retract", "recompute", "flush", "version"])
def test_copies_go_on_whatever_becomes_of_the_one_that_they_wait_for(how: str) -> None:
    scheduler = make_scheduler(budget=6)
    copies = make_copies(scheduler, list(range(17)), 3)
    step(scheduler)
    if how == "abort":
        scheduler.abort(copies.pop(0))
    elif how == "retract":
        scheduler.retract_all()
    elif how == "recompute":
        scheduler.recompute_all()
    elif how == "flush":
        scheduler.kv.flush()
    else:
        scheduler.kv.set_weight_version(1)
    for _ in range(12):
        step(scheduler)
    assert all(copy.num_output_tokens > 0 for copy in copies)


def test_a_copy_whose_prompt_logits_are_wanted_waits_for_nobody() -> None:
    scheduler = make_scheduler()
    make_copies(scheduler, list(range(10)), 2, logprob_start_len=0)
    assert chunks(step(scheduler)[0]) == [("c0.0", 0, 10), ("c1.0", 0, 10)]


def test_copies_do_not_wait_where_nothing_is_cached() -> None:
    scheduler = make_scheduler(prefix_cache=False)
    make_copies(scheduler, list(range(10)), 3)
    assert len(chunks(step(scheduler)[0])) == 3


def test_a_copy_goes_on_in_a_pool_that_has_no_room_to_keep_what_was_computed() -> None:
    scheduler = make_scheduler(budget=4, blocks=6)
    copies = make_copies(scheduler, list(range(9)), 3)
    done = []
    for _ in range(200):
        for request in scheduler.running:
            if request.num_output_tokens == 4:
                scheduler.finish(request)
                done.append(request)
        if not scheduler.has_work:
            break
        step(scheduler)
    assert set(done) == set(copies)


def test_who_had_no_room_beside_waiting_copies_is_admitted_when_these_are_aborted() -> None:
    scheduler = make_scheduler(blocks=10)
    copies = make_copies(scheduler, list(range(17)), 5)
    (other,) = make_requests(scheduler, [50] * 5)
    step(scheduler)
    assert other.status is RequestStatus.WAITING
    for copy in copies[1:]:
        scheduler.abort(copy)
    step(scheduler)
    assert other.status is RequestStatus.RUNNING
