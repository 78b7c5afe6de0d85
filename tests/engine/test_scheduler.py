"""The scheduler's policy: order, budgets, shared prompts, retraction, refusal."""

from __future__ import annotations

import pytest
from scheduler_support import chunks, make_requests, make_scheduler, step

from rollout.errors import ConfigError, InvalidRequestError
from rollout.sampling_params import SamplingParams
from rollout.scheduling import Request, ScheduledBatch, SchedulerConfig
from rollout.types import RequestStatus


def test_an_empty_scheduler_has_nothing_to_do() -> None:
    scheduler = make_scheduler()
    assert scheduler.schedule() is None and not scheduler.has_work


def test_a_long_prompt_is_computed_in_chunks_beside_decodes() -> None:
    scheduler = make_scheduler(budget=6)
    (short,) = make_requests(scheduler, 3)
    step(scheduler)
    (long,) = make_requests(scheduler, 12)
    seen = [chunks(step(scheduler)[0]) for _ in range(4)]
    assert seen == [
        [(short.rid, 3, 1), (long.rid, 0, 5)],
        [(short.rid, 4, 1), (long.rid, 5, 5)],
        [(short.rid, 5, 1), (long.rid, 10, 2)],
        [(short.rid, 6, 1), (long.rid, 12, 1)],
    ]


def test_only_the_end_of_the_known_tokens_samples() -> None:
    scheduler = make_scheduler(budget=5)
    (request,) = make_requests(scheduler, 12)
    flags = []
    for _ in range(3):
        batch, rows = step(scheduler)
        flags.append((batch.items[0].samples, batch.num_decodes, len(rows)))
    assert flags == [(False, 0, 0), (False, 0, 0), (True, 0, 1)]
    assert request.num_output_tokens == 1


def test_a_step_says_what_kinds_of_items_it_has() -> None:
    scheduler = make_scheduler(budget=6)
    make_requests(scheduler, 3)
    modes = [step(scheduler)[0].forward_mode]
    make_requests(scheduler, 12)
    modes += [step(scheduler)[0].forward_mode for _ in range(4)]
    assert [mode.value for mode in modes] == ["extend", "mixed", "mixed", "mixed", "decode"]
    assert ScheduledBatch([], [], 0, 0).forward_mode.is_idle()


def test_requests_are_admitted_in_order_of_arrival() -> None:
    scheduler = make_scheduler(running=2)
    requests = [make_requests(scheduler, 4)[0] for _ in range(4)]
    step(scheduler)
    assert scheduler.running == requests[:2] and scheduler.num_waiting == 2
    scheduler.finish(requests[0])
    step(scheduler)
    assert scheduler.running == [requests[1], requests[2]]
    assert scheduler.requests == requests[1:]


def test_the_token_budget_limits_the_running_requests_too() -> None:
    scheduler = make_scheduler(running=50, budget=3)
    for _ in range(6):
        make_requests(scheduler, 1)
    for _ in range(4):
        assert step(scheduler)[0].num_tokens <= 3
    assert scheduler.num_running == 3


def test_the_token_budget_limits_samples_of_one_prompt_too() -> None:
    scheduler = make_scheduler(running=50, budget=3)
    make_requests(scheduler, 2, n=6)
    for _ in range(3):
        assert step(scheduler)[0].num_tokens <= 3


def test_a_prompt_of_nothing_to_draw_gives_one_row_that_draws_nothing() -> None:
    scheduler = make_scheduler()
    (request,) = make_requests(scheduler, 4, max_new=0)
    _, rows = step(scheduler)
    assert [(row.request, row.draws) for row in rows] == [(request, False)]
    scheduler.finish(request)
    assert not scheduler.has_work and scheduler.kv.num_held == 0


def test_prompt_and_output_are_found_by_the_next_turn() -> None:
    scheduler = make_scheduler()
    (first,) = make_requests(scheduler, 6, max_new=12)
    for _ in range(12):
        step(scheduler)
    scheduler.finish(first)
    (turn,) = make_requests(scheduler, [*first.token_ids, 50, 51, 52])
    batch, _ = step(scheduler)
    # The last token of the output was drawn but never computed.
    assert first.num_tokens == 18 and chunks(batch) == [(turn.rid, 16, 5)]


# Samples of one prompt ------------------------------------------------------------------------------------------------


def test_samples_share_one_computation_of_their_prompt() -> None:
    scheduler = make_scheduler(budget=6)
    requests = make_requests(scheduler, 10, n=4)
    batch, rows = step(scheduler)
    assert chunks(batch) == [(requests[0].rid, 0, 6)] and rows == []
    batch, rows = step(scheduler)
    assert chunks(batch) == [(requests[0].rid, 6, 4)]
    assert [(row.item_index, row.request) for row in rows] == [(0, r) for r in requests]
    batch, rows = step(scheduler)
    last = [request.block_ids[2] for request in requests]
    assert batch.block_copies == [(last[0], block) for block in last[1:]]
    assert batch.num_tokens == batch.num_decodes == len(rows) == 4
    assert batch.forward_mode.is_decode() and not batch.forward_mode.is_extend()
    assert all(request.block_ids[:2] == requests[0].block_ids[:2] for request in requests)
    assert [request.num_cached_tokens for request in requests] == [0, 10, 10, 10]
    assert step(scheduler)[0].block_copies == []


def test_samples_without_a_slot_come_later_through_the_prefix_cache() -> None:
    scheduler = make_scheduler(running=2)
    requests = make_requests(scheduler, 10, n=4)
    _, rows = step(scheduler)
    assert [row.request for row in rows] == requests[:2]
    scheduler.finish(requests[0])
    batch, rows = step(scheduler)
    assert (requests[2].rid, 8, 2) in chunks(batch)
    assert requests[2].num_cached_tokens == 8 and requests[2] in [row.request for row in rows]


def test_samples_without_a_block_come_later_and_none_is_lost() -> None:
    scheduler = make_scheduler(blocks=4)
    requests = make_requests(scheduler, 10, n=4, max_new=3)
    _, rows = step(scheduler)
    assert [row.request for row in rows] == requests[:2]
    done = []
    while scheduler.has_work:
        for request in scheduler.running:
            if request.num_output_tokens == 3:
                scheduler.finish(request)
                done.append(request)
        if scheduler.has_work:
            step(scheduler)
    assert sorted(request.rid for request in done) == [request.rid for request in requests]


@pytest.mark.parametrize("budget", [6, 64])
def test_slots_are_kept_for_samples_that_will_be_forked(budget: int) -> None:
    scheduler = make_scheduler(running=3, budget=budget)
    group = make_requests(scheduler, 10, n=3)
    (single,) = make_requests(scheduler, 2)
    while not step(scheduler)[1]:
        assert scheduler.running == group[:1]
    assert scheduler.running == group and single.status is RequestStatus.WAITING


def test_when_the_leader_is_aborted_the_next_sample_leads() -> None:
    scheduler = make_scheduler(budget=6)
    requests = make_requests(scheduler, 10, n=3)
    step(scheduler)
    scheduler.abort(requests[0])
    batch, _ = step(scheduler)
    # What the leader has computed is found in the prefix cache.
    assert chunks(batch) == [(requests[1].rid, 4, 6)]
    _, rows = step(scheduler)
    assert [row.request for row in rows] == requests[1:]


def test_a_leader_aborted_in_the_queue_passes_its_place_on() -> None:
    scheduler = make_scheduler(running=1)
    group = make_requests(scheduler, 4, n=2)
    make_requests(scheduler, 4)
    scheduler.abort(group[0])
    assert step(scheduler)[0].items[0].request is group[1]


def test_samples_are_not_forked_from_kv_of_two_versions() -> None:
    scheduler = make_scheduler(budget=6)
    requests = make_requests(scheduler, 10, n=3)
    step(scheduler)
    scheduler.kv.set_weight_version(1)
    batch, rows = step(scheduler)
    assert [row.request for row in rows] == requests[:1]
    batch, _ = step(scheduler)
    assert chunks(batch) == [(requests[0].rid, 10, 1), (requests[1].rid, 0, 5)]
    step(scheduler)
    assert {row.request for row in step(scheduler)[1]} == set(requests)
    group = requests[2].group
    assert group is not None and group.leader is requests[1]


def test_samples_that_start_again_wait_for_one_of_them_to_compute_the_prompt() -> None:
    scheduler = make_scheduler(budget=64)
    requests = make_requests(scheduler, 20, n=3)
    step(scheduler)
    scheduler.recompute_all()
    scheduler.kv.set_weight_version(1)
    assert chunks(step(scheduler)[0]) == [(requests[0].rid, 0, 21)]
    batch, _ = step(scheduler)
    assert chunks(batch)[1:] == [(requests[1].rid, 20, 1), (requests[2].rid, 20, 1)]


# Memory pressure ------------------------------------------------------------------------------------------------------


def test_the_latest_request_gives_its_blocks_back_and_loses_nothing() -> None:
    scheduler = make_scheduler(blocks=7, prefix_cache=False)
    early, late = (make_requests(scheduler, 8, max_new=12)[0] for _ in range(2))
    for token in range(5):
        step(scheduler, token)
    assert scheduler.running == [early, late]
    before = list(late.token_ids)
    while late.status is RequestStatus.RUNNING:
        batch, _ = step(scheduler, 9)
    assert all(item.request is early for item in batch.items)
    assert late.num_retractions == scheduler.num_retractions == 1
    assert late.token_ids[: len(before)] == before and late.block_ids == []
    length = late.num_tokens
    scheduler.finish(early)
    batch, rows = step(scheduler)
    assert chunks(batch) == [(late.rid, 0, length)] and rows[0].request is late


def test_a_retracted_request_finds_its_blocks_again() -> None:
    scheduler = make_scheduler()
    (request,) = make_requests(scheduler, 10)
    step(scheduler)
    step(scheduler)
    scheduler.retract_all()
    assert scheduler.num_running == 0 and request.num_retractions == 1
    batch, rows = step(scheduler)
    assert chunks(batch) == [(request.rid, 8, 4)] and len(rows) == 1
    assert request.num_cached_tokens == 0


def test_a_retracted_request_stands_before_all_that_came_later() -> None:
    scheduler = make_scheduler(running=2)
    requests = [make_requests(scheduler, 4)[0] for _ in range(4)]
    step(scheduler)
    scheduler.retract_all()
    step(scheduler)
    assert scheduler.running == requests[:2]


def test_nobody_is_admitted_whose_blocks_the_running_ones_need_next() -> None:
    scheduler = make_scheduler(blocks=6, prefix_cache=False)
    (first,) = make_requests(scheduler, 8, max_new=9)
    (second,) = make_requests(scheduler, 12, max_new=1)
    step(scheduler)
    # Two blocks are held, three would be taken, and one is left for the two that need one each.
    assert scheduler.running == [first] and second.status is RequestStatus.WAITING
    scheduler.finish(first)
    step(scheduler)
    assert scheduler.running == [second]


def test_a_request_that_did_not_fit_is_looked_at_again_only_after_a_release(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scheduler = make_scheduler(blocks=6)
    (first,) = make_requests(scheduler, 8, max_new=9)
    make_requests(scheduler, 12, max_new=1)
    looks = []
    match = scheduler.kv.match
    monkeypatch.setattr(
        scheduler.kv, "match", lambda request, limit: looks.append(request) or match(request, limit)
    )
    for _ in range(5):
        step(scheduler)
    assert len(looks) == 2
    scheduler.finish(first)
    step(scheduler)
    assert len(looks) == 3 and scheduler.num_running == 1


def test_a_lone_request_can_use_the_whole_pool() -> None:
    scheduler = make_scheduler(blocks=4)
    (request,) = make_requests(scheduler, 9, max_new=8)
    for _ in range(8):
        step(scheduler)
    assert request.num_output_tokens == 8 and scheduler.num_retractions == 0


def test_a_request_that_can_never_fit_is_refused_and_nothing_is_queued() -> None:
    scheduler = make_scheduler(blocks=4)
    make_requests(scheduler, 9, max_new=8)
    with pytest.raises(InvalidRequestError, match=r"got 10 prompt tokens and max_new_tokens=8, "):
        make_requests(scheduler, 10, max_new=8)
    with pytest.raises(InvalidRequestError, match="got an empty prompt"):
        make_requests(scheduler, 0)
    short = SamplingParams(max_new_tokens=1)
    with pytest.raises(InvalidRequestError, match="is in use"):
        scheduler.add([Request(rid="r0.0", prompt_ids=[1], params=short)])
    twins = [Request(rid="twin", prompt_ids=[1], params=short) for _ in range(2)]
    with pytest.raises(InvalidRequestError, match="is in use"):
        scheduler.add(twins)
    assert len(scheduler.requests) == 1 and scheduler.find("twin") is None
    scheduler.check_invariants()


# Versions, aborts, log-probabilities ----------------------------------------------------------------------------------


def test_recompute_drops_kv_of_running_requests_and_keeps_their_place() -> None:
    scheduler = make_scheduler(running=2, budget=32)
    requests = [make_requests(scheduler, 10)[0] for _ in range(3)]
    for _ in range(3):
        step(scheduler)
    scheduler.recompute_all()
    scheduler.kv.set_weight_version(5)
    batch, rows = step(scheduler)
    assert chunks(batch) == [(request.rid, 0, 13) for request in requests[:2]]
    assert [row.request for row in rows] == requests[:2]
    assert all(scheduler.kv.versions_of(b) == (5, 5) for r in requests[:2] for b in r.block_ids)
    assert scheduler.num_retractions == 0


def test_kept_kv_is_not_found_by_later_requests_of_the_new_version() -> None:
    scheduler = make_scheduler()
    prompt = list(range(8))
    make_requests(scheduler, prompt)
    step(scheduler)
    scheduler.kv.set_weight_version(1)
    for _ in range(6):
        step(scheduler)
    (late,) = make_requests(scheduler, [*prompt, 7, 7, 7])
    step(scheduler)
    assert late.num_cached_tokens == 0
    (later,) = make_requests(scheduler, [*prompt, 7, 7, 7])
    step(scheduler)
    assert later.num_cached_tokens == 8


def test_a_finished_request_whose_tokens_are_taken_back_goes_on_in_its_old_place() -> None:
    scheduler = make_scheduler(running=1)
    first, second = (make_requests(scheduler, 6)[0] for _ in range(2))
    for _ in range(3):
        step(scheduler)
    scheduler.finish(first)
    step(scheduler)
    scheduler.kv.set_weight_version(1)
    scheduler.retract_all()
    del first.token_ids[7:], second.token_ids[6:]
    scheduler.revive(first)
    scheduler.check_invariants()
    assert scheduler.requests == [first, second]
    batch, _ = step(scheduler)
    assert chunks(batch) == [(first.rid, 0, 7)] and scheduler.num_waiting == 1


def test_aborts_between_schedule_and_complete_are_left_out() -> None:
    scheduler = make_scheduler()
    stays, goes = (make_requests(scheduler, 6)[0] for _ in range(2))
    batch = scheduler.schedule()
    assert batch is not None
    scheduler.abort(goes)
    scheduler.abort(goes)
    assert [row.request for row in scheduler.complete(batch)] == [stays]
    scheduler.check_invariants()
    assert scheduler.find(goes.rid) is None and scheduler.find(stays.rid) is stays


def test_positions_with_wanted_logits_are_not_taken_from_the_cache() -> None:
    scheduler = make_scheduler(budget=7)
    prompt = list(range(17))
    (warm,) = make_requests(scheduler, prompt)
    for _ in range(3):
        step(scheduler)
    scheduler.finish(warm)
    (request,) = make_requests(scheduler, prompt, logprob_start_len=9)
    wanted = [list(step(scheduler)[0].items[0].input_logprobs or ()) for _ in range(2)]
    # Token 9 is predicted by position 8; the last position predicts the first output token.
    assert request.num_cached_tokens == 8 and wanted == [list(range(8, 15)), [15]]
    (free,) = make_requests(scheduler, prompt)
    assert step(scheduler)[0].items[-1].input_logprobs is None and free.num_cached_tokens == 16


def test_input_logprobs_are_not_asked_for_twice_after_a_retraction() -> None:
    scheduler = make_scheduler(budget=6)
    make_requests(scheduler, 12, logprob_start_len=0)
    asked = []
    for _ in range(2):
        asked += list(step(scheduler)[0].items[0].input_logprobs or ())
    scheduler.retract_all()
    for _ in range(3):
        asked += list(step(scheduler)[0].items[0].input_logprobs or ())
    assert asked == list(range(11))


def test_input_logprobs_of_an_unfinished_prompt_start_again_with_new_weights() -> None:
    scheduler = make_scheduler(budget=6)
    (request,) = make_requests(scheduler, 12, logprob_start_len=0)
    step(scheduler)
    scheduler.recompute_all()
    scheduler.kv.set_weight_version(1)
    assert step(scheduler)[0].items[0].input_logprobs == range(6)
    assert request.num_output_tokens == 0


def test_input_logprobs_are_wanted_again_once_every_token_is_taken_back() -> None:
    scheduler = make_scheduler()
    (request,) = make_requests(scheduler, 12, logprob_start_len=4)
    step(scheduler)
    request.rewind_input_logprobs()
    scheduler.retract_all()
    assert step(scheduler)[0].items[0].input_logprobs is None
    scheduler.retract_all()
    scheduler.kv.set_weight_version(1)
    del request.token_ids[12:]
    request.rewind_input_logprobs()
    assert step(scheduler)[0].items[0].input_logprobs == range(3, 11)


def test_only_the_leader_computes_input_logprobs_of_samples() -> None:
    scheduler = make_scheduler(running=2)
    requests = make_requests(scheduler, 10, n=3, logprob_start_len=0)
    batch, _ = step(scheduler)
    assert batch.items[0].input_logprobs == range(9)
    scheduler.finish(requests[0])
    batch, _ = step(scheduler)
    assert chunks(batch)[1] == (requests[2].rid, 8, 2)
    assert all(item.input_logprobs is None for item in batch.items)


def test_impossible_limits_are_refused() -> None:
    with pytest.raises(ConfigError, match="chunked_prefill_size: got 0, expected at least 1"):
        SchedulerConfig(max_running_requests=1, chunked_prefill_size=0)
