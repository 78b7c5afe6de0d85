"""Which replica gets a prompt, and what becomes of it when the replica dies: decisions, without any process."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from typing import Any

import msgspec
import pytest

from rollout.errors import ConfigError, InvalidRequestError
from rollout.pool.config import PoolConfig
from rollout.pool.dispatcher import Dispatcher
from rollout.pool.job import Job, PoolCall
from rollout.pool.routing import Router
from rollout.protocol.commands import FinishReason, PromptSpec, SampleUpdate, Span
from rollout.sampling_params import SamplingParams
from weight_sync.errors import EngineDiedError, TornWeightsError

DIED = EngineDiedError("killed")


# ---- routing ---------------------------------------------------------------------------------------------------------


def router(limit: int = 100, affinity_tokens: int = 4, slack: int = 2) -> Router:
    return Router(limit=limit, affinity_tokens=affinity_tokens, slack=slack)


def test_the_least_busy_replica_gets_a_prompt_that_prefers_none() -> None:
    assert router().choose(None, 1, {0: 3, 1: 1, 2: 2}) == 1
    assert router().choose(None, 1, {2: 0, 1: 0}) == 1


def test_prompts_that_begin_alike_go_to_the_same_replica_and_others_spread() -> None:
    loads = dict.fromkeys(range(4), 0)
    chosen = {
        head: {
            router().choose(router().affinity([head, 1, 2, 3, tail]), 1, loads) for tail in range(9)
        }
        for head in range(40)
    }
    assert all(len(replicas) == 1 for replicas in chosen.values())
    assert set.union(*chosen.values()) == {0, 1, 2, 3}


def test_a_prompt_that_is_too_short_to_share_anything_has_no_preference() -> None:
    assert router(affinity_tokens=4).affinity([1, 2, 3]) is None
    assert router(affinity_tokens=0).affinity([1, 2, 3]) is None


def test_the_preferred_replica_is_left_when_it_is_much_busier() -> None:
    key = router().affinity([1, 2, 3, 4])
    preferred = router().choose(key, 1, {0: 0, 1: 0})
    other = 1 - preferred
    assert router(slack=2).choose(key, 1, {preferred: 2, other: 0}) == preferred
    assert router(slack=2).choose(key, 1, {preferred: 3, other: 0}) == other
    # A quarter more than the least busy one is not much, however many that is.
    assert router(slack=2, limit=999).choose(key, 1, {preferred: 502, other: 400}) == preferred
    assert router(slack=2, limit=999).choose(key, 1, {preferred: 503, other: 400}) == other


def test_when_a_replica_goes_only_its_own_prompts_change_their_preference() -> None:
    keys = [router().affinity([i, 1, 2, 3]) for i in range(60)]
    before = [router().choose(key, 1, dict.fromkeys(range(4), 0)) for key in keys]
    after = [router().choose(key, 1, dict.fromkeys((0, 1, 3), 0)) for key in keys]
    assert [(b, a) for b, a in zip(before, after, strict=True) if b != 2 and a != b] == []
    assert 2 in before


def test_a_full_replica_gets_nothing_and_when_all_are_full_the_prompt_waits() -> None:
    assert router(limit=8).choose(None, 4, {0: 5, 1: 4}) == 1
    assert router(limit=8).choose(None, 4, {0: 5, 1: 6}) is None
    assert router(limit=8).choose(None, 4, {}) is None


def test_a_prompt_with_more_samples_than_the_limit_runs_on_an_idle_replica() -> None:
    assert router(limit=8).choose(None, 64, {0: 1, 1: 0}) == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_replicas", 0), ("max_inflight_samples", 0), ("max_reruns", -1), ("health_timeout_s", 0)],
)
def test_options_out_of_range_are_refused_by_name(name: str, value: int) -> None:
    with pytest.raises(ConfigError, match=rf"{name}: got {value}"):
        PoolConfig(**{name: value}).check()


# ---- dispatching -----------------------------------------------------------------------------------------------------


class FakeReplica:
    """Notes what it is given; the test answers in its place."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.jobs: list[tuple[Job, int]] = []
        self.aborts: list[list[str]] = []
        self.errors: list[Exception] = []
        self.takes_more = True

    def generate(self, job: Job) -> None:
        self.jobs.append((job, job.attempt))

    def abort(self, job: Job, rids: Collection[str]) -> None:
        self.aborts.append(list(rids))

    def lost(self, error: Exception) -> None:
        self.errors.append(error)


class Pool:
    """A dispatcher with fake replicas."""

    def __init__(self, num_replicas: int, limit: int = 4, max_reruns: int = 2) -> None:
        self.chunks: dict[int, list[SampleUpdate]] = {}
        self.dispatcher = Dispatcher(
            Router(limit=limit, affinity_tokens=0, slack=0),
            seed=7,
            max_reruns=max_reruns,
            served=lambda: ("v5", 5),
        )
        self.replicas = {i: FakeReplica(i) for i in range(num_replicas)}
        for replica in self.replicas.values():
            self.dispatcher.join(replica)

    def call(
        self, num_prompts: int, n: int = 1, timeout_s: float = 60.0, **fields: Any
    ) -> PoolCall:
        key = len(self.chunks)
        chunks = self.chunks.setdefault(key, [])
        call = PoolCall(stream=False, deadline=time.monotonic() + timeout_s, on_chunk=chunks.append)
        specs = [
            PromptSpec(rid=f"c{key}p{i}", input_ids=[i], params=SamplingParams(n=n), **fields)
            for i in range(num_prompts)
        ]
        self.dispatcher.add(call, specs)
        return call

    def finish(self, number: int, samples: Sequence[int] | None = None, token: int = 0) -> None:
        """A replica finishes (these samples of) the oldest job that it was given."""
        job, attempt = self.replicas[number].jobs[0]
        for sample in range(job.num_samples) if samples is None else samples:
            self.dispatcher.update(job, attempt, finished(job, sample, token))
        if samples is None:
            self.replicas[number].jobs.pop(0)
            self.dispatcher.ended(job, attempt, None)

    def prompts(self, number: int) -> list[str]:
        return [job.spec.rid for job, _ in self.replicas[number].jobs]


def finished(job: Job, sample: int, token: int = 0, reason: str = "length") -> SampleUpdate:
    return SampleUpdate(
        index=sample,
        rid=job.sample_rid(sample),
        output_ids=[token],
        finish_reason=FinishReason(type=reason),
        prompt_tokens=1,
        cached_tokens=0,
        weight_version="v5",
        weight_versions=[Span("v5", 0, 1, 5)],
    )


def test_prompts_wait_in_order_until_a_replica_has_room() -> None:
    pool = Pool(2, limit=2)
    call = pool.call(3, n=2)
    assert (pool.prompts(0), pool.prompts(1)) == (["c0p0"], ["c0p1"])
    assert pool.dispatcher.num_waiting == 2
    pool.finish(1)
    assert pool.prompts(1) == ["c0p2"] and pool.dispatcher.num_waiting == 0
    pool.finish(0)
    assert not call.future.done()
    pool.finish(1)
    assert call.future.result(0).count == 6


def test_a_finished_sample_makes_room_before_its_prompt_is_done() -> None:
    pool = Pool(1, limit=3)
    pool.call(1, n=3)
    pool.call(1, n=1)
    assert pool.prompts(0) == ["c0p0"]
    pool.finish(0, samples=[2])
    assert pool.prompts(0) == ["c0p0", "c1p0"] and pool.dispatcher.loads == {0: 3}


def test_results_carry_the_index_that_the_caller_counts_by() -> None:
    pool = Pool(2)
    pool.call(3, n=2)
    for number in (1, 0, 0):
        pool.finish(number)
    assert sorted(update.index for update in pool.chunks[0]) == [0, 1, 2, 3, 4, 5]
    by_index = {update.index: update.rid for update in pool.chunks[0]}
    assert by_index[3] == "c0p1-1"


def test_prompts_without_a_seed_get_one_that_no_other_has_and_given_seeds_stay() -> None:
    pool = Pool(2, limit=100)
    pool.call(40)
    specs = [job.spec for replica in pool.replicas.values() for job, _ in replica.jobs]
    assert len({spec.params.sampling_seed for spec in specs}) == 40
    again = Pool(3, limit=100)
    again.call(40)
    others = [job.spec for replica in again.replicas.values() for job, _ in replica.jobs]
    assert {s.rid: s.params.sampling_seed for s in specs} == {
        s.rid: s.params.sampling_seed for s in others
    }
    call = PoolCall(stream=False, deadline=time.monotonic() + 9, on_chunk=None)
    fixed = PromptSpec(rid="x", input_ids=[1], params=SamplingParams(sampling_seed=5))
    pool.dispatcher.add(call, [fixed])
    assert call.jobs[0].spec.params.sampling_seed == 5


def test_what_a_dead_replica_was_doing_runs_again_elsewhere_first_and_is_marked() -> None:
    pool = Pool(2, limit=2)
    call = pool.call(6)
    dead = pool.prompts(0)
    pool.dispatcher.leave(0, DIED)
    pool.finish(1)
    pool.finish(1)
    assert pool.prompts(1) == dead  # Before those that had only waited.
    for _ in range(4):
        pool.finish(1)
    assert call.future.result(0).count == 6
    reruns = {update.rid: update.num_reruns for update in pool.chunks[0]}
    assert {rid for rid, num in reruns.items() if num == 1} == set(dead) and len(reruns) == 6


def test_samples_that_the_caller_has_are_not_delivered_again() -> None:
    pool = Pool(2)
    call = pool.call(1, n=3)
    pool.finish(0, samples=[1], token=11)
    pool.dispatcher.leave(0, DIED)
    pool.finish(1, token=22)
    assert call.future.result(0).count == 3
    tokens = {update.index: update.output_ids for update in pool.chunks[0]}
    assert tokens == {0: [22], 1: [11], 2: [22]} and len(pool.chunks[0]) == 3


def test_late_answers_of_a_lost_attempt_reach_nobody() -> None:
    pool = Pool(2)
    call = pool.call(1)
    job, attempt = pool.replicas[0].jobs[0]
    pool.dispatcher.leave(0, DIED)
    pool.dispatcher.update(job, attempt, finished(job, 0, token=99))
    pool.dispatcher.ended(job, attempt, None)
    assert pool.chunks[0] == [] and not call.future.done()
    pool.finish(1, token=1)
    assert [update.output_ids for update in pool.chunks[0]] == [[1]] and call.future.done()


def test_a_job_that_died_after_its_last_sample_is_not_run_again() -> None:
    pool = Pool(2)
    call = pool.call(1, n=2)
    pool.finish(0, samples=[0, 1])
    pool.dispatcher.leave(0, DIED)
    assert call.future.result(0).count == 2 and pool.prompts(1) == []


@pytest.mark.parametrize("error", [DIED, TornWeightsError("half written")])
def test_an_error_of_a_lost_replica_takes_it_out_and_tells(error: Exception) -> None:
    pool = Pool(2)
    call = pool.call(2)
    job, attempt = pool.replicas[0].jobs[0]
    pool.dispatcher.ended(job, attempt, error)
    assert pool.replicas[0].errors == [error] and pool.replicas[1].errors == []
    assert sorted(pool.prompts(1)) == ["c0p0", "c0p1"]
    pool.finish(1)
    pool.finish(1)
    assert call.future.done() and list(pool.dispatcher.loads) == [1]


def test_a_prompt_that_is_lost_again_and_again_is_an_error_in_the_end() -> None:
    pool = Pool(4, max_reruns=2)
    call = pool.call(1)
    for number in range(3):
        assert not call.future.done()
        pool.dispatcher.leave(number, DIED)
    with pytest.raises(EngineDiedError):
        call.future.result(0)
    assert pool.prompts(3) == []


def test_an_abort_that_nobody_asked_for_is_a_lost_sample() -> None:
    pool = Pool(1)
    call = pool.call(1)
    job, attempt = pool.replicas[0].jobs.pop()
    pool.dispatcher.update(job, attempt, finished(job, 0, reason="abort"))
    pool.dispatcher.ended(job, attempt, None)
    assert pool.chunks[0] == [] and pool.prompts(0) == ["c0p0"] and not call.future.done()


def test_aborts_end_what_waits_at_once_and_reach_what_runs() -> None:
    pool = Pool(1, limit=2)
    call = pool.call(3, n=2, return_logprob=True)
    assert pool.dispatcher.abort(["c0p0", "c0p2"], False, "enough") == 4
    assert pool.replicas[0].aborts == [["c0p0"]]
    assert [u.rid for u in pool.chunks[0]] == ["c0p2-0", "c0p2-1"]
    update = pool.chunks[0][0]
    assert (update.finish_reason.type, update.finish_reason.message) == ("abort", "enough")
    assert update.weight_versions == [Span("v5", 0, 0, 5)] and update.output_logprobs == []
    job, attempt = pool.replicas[0].jobs.pop()
    for sample in range(2):
        pool.dispatcher.update(job, attempt, finished(job, sample, reason="abort"))
    pool.dispatcher.ended(job, attempt, None)
    assert len(pool.chunks[0]) == 4 and pool.prompts(0) == ["c0p1"]
    pool.finish(0)
    assert call.future.result(0).count == 6


def test_an_error_of_one_prompt_ends_its_call_and_no_other() -> None:
    pool = Pool(1, limit=2)
    bad, good = pool.call(3), pool.call(1)
    job, attempt = pool.replicas[0].jobs.pop(0)
    pool.dispatcher.ended(job, attempt, InvalidRequestError("too long"))
    with pytest.raises(InvalidRequestError):
        bad.future.result(0)
    assert pool.replicas[0].aborts == [["c0p1"]] and pool.dispatcher.num_waiting == 0
    pool.finish(0)  # What was aborted.
    pool.finish(0)
    assert good.future.result(0).count == 1 and pool.dispatcher.loads == {0: 0}


def test_what_waits_past_its_deadline_ends_and_says_so() -> None:
    pool = Pool(1, limit=1)
    pool.call(1)
    late = pool.call(2, timeout_s=5.0)
    pool.dispatcher.expire(time.monotonic())
    assert not late.future.done()
    pool.dispatcher.expire(time.monotonic() + 6.0)
    assert late.future.result(0).count == 2
    reasons = [update.finish_reason for update in pool.chunks[1] if update.finish_reason]
    assert [reason.type for reason in reasons] == ["abort", "abort"]
    assert all("waiting for a replica" in (reason.message or "") for reason in reasons)
    assert pool.dispatcher.num_waiting == 0


def test_without_any_replica_prompts_wait_and_when_none_will_come_they_fail() -> None:
    pool = Pool(1)
    call = pool.call(2)
    pool.dispatcher.leave(0, DIED)
    assert pool.dispatcher.num_waiting == 2
    pool.dispatcher.block(DIED)
    with pytest.raises(EngineDiedError):
        call.future.result(0)
    with pytest.raises(EngineDiedError):
        pool.call(1).future.result(0)
    pool.replicas[1] = FakeReplica(1)
    pool.dispatcher.join(pool.replicas[1])
    assert not pool.call(1).future.done() and pool.prompts(1) == ["c2p0"]


def test_a_retired_replica_finishes_what_it_has_and_gets_nothing_new() -> None:
    pool = Pool(2)
    call = pool.call(2)
    pool.replicas[0].takes_more = False
    pool.call(2)
    assert pool.prompts(0) == ["c0p0"] and pool.prompts(1) == ["c0p1", "c1p0", "c1p1"]
    assert pool.dispatcher.abort(["c0p0"], False, "") == 1 and pool.replicas[0].aborts
    pool.finish(0)
    pool.finish(1)
    assert call.future.done() and pool.dispatcher.loads[0] == 0


def test_while_the_weights_are_gone_calls_are_refused_and_what_waits_stays() -> None:
    pool = Pool(1, limit=1)
    waiting = pool.call(2)
    pool.dispatcher.refuse(TornWeightsError("released"))
    with pytest.raises(TornWeightsError):
        pool.call(1).future.result(0)
    pool.finish(0)
    assert pool.prompts(0) == []
    pool.dispatcher.refuse(None)
    assert pool.prompts(0) == ["c0p1"]
    pool.finish(0)
    assert waiting.future.result(0).count == 2


def test_a_replica_that_cannot_be_given_a_prompt_gives_back_what_it_took() -> None:
    pool = Pool(1, limit=2)
    replica = pool.replicas[0]
    replica.generate = lambda job: job.spec.rid.encode()  # type: ignore[method-assign, assignment]
    call = PoolCall(stream=False, deadline=time.monotonic() + 9, on_chunk=None)
    bad = PromptSpec(rid="\ud800", input_ids=[1], params=SamplingParams(n=2))
    pool.dispatcher.add(call, [bad, bad])
    with pytest.raises(UnicodeEncodeError):
        call.future.result(0)
    assert pool.dispatcher.loads == {0: 0} and pool.dispatcher.num_waiting == 0
    del replica.generate  # type: ignore[method-assign]
    pool.call(1, n=2)
    assert pool.prompts(0) == ["c0p0"]


def test_each_attempt_has_an_id_of_its_own_at_its_replica_and_the_caller_sees_none_of_them() -> (
    None
):
    pool = Pool(2)
    call = pool.call(1, n=2)
    job, attempt = pool.replicas[0].jobs[0]
    first = job.command.prompts[0].rid
    assert job.wire_rids({"c0p0-1", "another"}) == [f"{first}-1"]
    pool.dispatcher.leave(0, DIED)  # It is alive, and comes back with what it was doing.
    assert pool.replicas[0].aborts == [["c0p0"]]
    pool.dispatcher.join(pool.replicas[0])
    pool.dispatcher.leave(1, DIED)
    assert job.command.prompts[0].rid != first and pool.replicas[0].jobs[-1][0] is job
    late = finished(job, 0)
    pool.dispatcher.update(job, attempt, late)
    assert pool.chunks[0] == []
    for sample in range(2):
        update = finished(job, sample)
        update = msgspec.structs.replace(update, rid=f"{job.wire_rid}-{sample}")
        pool.dispatcher.update(job, job.attempt, update)
    pool.dispatcher.ended(job, job.attempt, None)
    assert [update.rid for update in pool.chunks[0]] == ["c0p0-0", "c0p0-1"]
    assert call.future.result(0).count == 2


def test_an_id_that_is_in_use_is_refused_until_its_call_has_ended() -> None:
    pool = Pool(2)

    def call(rid: str, n: int = 1) -> PoolCall:
        made = PoolCall(stream=False, deadline=time.monotonic() + 9, on_chunk=None)
        spec = PromptSpec(rid=rid, input_ids=[1], params=SamplingParams(n=n))
        pool.dispatcher.add(made, [spec])
        return made

    first = call("a", n=2)
    with pytest.raises(InvalidRequestError, match="'a-1', which is in use"):
        call("a-1").future.result(0)
    pool.finish(0)
    assert first.future.result(0).count == 2
    again = call("a-1")
    pool.finish(0)
    assert again.future.result(0).count == 1
    pool.dispatcher.expire(time.monotonic())
    assert pool.dispatcher._calls == {}
