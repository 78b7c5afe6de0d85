"""An update that several ranks verify while they generate: tokens are handed out by all of them, or by none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from engine_faults import (
    PROMPT_SETS,
    FaultyEngine,
    Stream,
    check_spans,
    is_alive,
    kill_all,
    wait_for,
)
from versions import Reference, version_weights

import weight_sync
from weight_sync import WeightPublisher
from weight_sync.errors import EngineDiedError
from weight_sync.wire.deadline import Deadline

OLD, NEW, NEXT = 1, 2, 3


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(3) as pool:
        yield pool


def publish(engine: FaultyEngine, number: int, *, timeout_s: float = 90.0, **options: Any) -> Any:
    with WeightPublisher(engine.address, timeout_s=timeout_s) as publisher:
        weights = version_weights(engine.folder, number)
        return publisher.publish(weights, label=f"v{number}", **options)


def generate(engine: FaultyEngine) -> dict[str, Any]:
    params = {"temperature": 0.0, "max_new_tokens": 6, "ignore_eos": True}
    result: dict[str, Any] = engine.engine.generate(
        input_ids=PROMPT_SETS[1], sampling_params=params, return_logprob=True
    )
    return result


def held_at(
    engine: FaultyEngine, rank: int, threads: ThreadPoolExecutor, **options: Any
) -> tuple[Future[Any], Future[Any]]:
    """Let `rank` stop before it verifies version NEW: the update, and a call whose tokens are there and held."""
    engine.points.stop("verify", rank)
    update = threads.submit(publish, engine, NEW, verify="overlapped", **options)
    engine.points.reached("verify", rank)
    wait_for("the new version", lambda: engine.engine.status().weight_version == f"v{NEW}")
    before = engine.engine.status().num_prompt_tokens
    call = threads.submit(generate, engine)

    def all_are_computed() -> bool:
        status = engine.engine.status()
        begun = status.num_prompt_tokens >= before + len(PROMPT_SETS[1])
        return begun and status.num_running == status.num_waiting == 0

    wait_for("the end of all that is computed", all_are_computed)
    assert not update.done() and not call.done()
    return update, call


@pytest.mark.parametrize("rank", [0, 1])
def test_tokens_are_held_until_all_ranks_have_compared(
    engine_of: Callable[..., FaultyEngine],
    reference: Reference,
    threads: ThreadPoolExecutor,
    rank: int,
) -> None:
    engine = engine_of(tp_size=2)
    publish(engine, OLD)
    stream = Stream(engine.engine)
    update, call = held_at(engine, rank, threads)
    engine.points.clear()
    assert update.result(30).complete
    assert check_spans(PROMPT_SETS[1], call.result(30), reference) == [NEW]
    for result in stream.stop():
        check_spans(PROMPT_SETS[0], result, reference)
    engine.serves(NEW)
    publish(engine, NEXT, verify="overlapped")
    engine.serves(NEXT)


@pytest.mark.parametrize("rank", [0, 1])
def test_when_one_rank_lies_all_go_back_and_what_was_held_was_never_sampled(
    engine_of: Callable[..., FaultyEngine],
    reference: Reference,
    threads: ThreadPoolExecutor,
    rank: int,
) -> None:
    engine = engine_of(tp_size=2, keep_previous_weights=True)
    publish(engine, OLD)
    stream = Stream(engine.engine)
    engine.points.damage(rank)
    update, call = held_at(engine, 1 - rank, threads)
    engine.points.clear()
    with pytest.raises(weight_sync.FingerprintMismatch, match="restored and serves"):
        update.result(30)
    assert check_spans(PROMPT_SETS[1], call.result(30), reference) == [OLD]
    engine.serves(OLD)
    for result in stream.stop():
        assert set(check_spans(PROMPT_SETS[0], result, reference)) == {OLD}
    publish(engine, NEXT, verify="overlapped")
    engine.serves(NEXT)


def torn(engine: FaultyEngine) -> str | None:
    """What the engine's receiver says, whatever its loop does."""
    with WeightPublisher(engine.address) as publisher:
        return publisher._endpoint.hello(Deadline(60.0)).torn


@pytest.mark.parametrize("stuck", [False, True])
def test_without_a_copy_or_a_boundary_to_undo_it_all_ranks_are_torn(
    engine_of: Callable[..., FaultyEngine], threads: ThreadPoolExecutor, stuck: bool
) -> None:
    """`stuck`: a copy is there, but rank 0 comes to no step boundary before the update's deadline."""
    engine = engine_of(tp_size=2, keep_previous_weights=stuck)
    publish(engine, OLD)
    stream = Stream(engine.engine, endless=True)
    engine.points.damage(1)
    update, call = held_at(engine, 1, threads, timeout_s=20.0 if stuck else 90.0)
    if stuck:
        engine.points.stop("step", 0)
        another = threads.submit(generate, engine)
        engine.points.reached("step", 0)
    engine.points.go_on("verify", 1)
    with pytest.raises((weight_sync.TornWeightsError, weight_sync.DeadlineExceeded)):
        update.result(60)
    # Its caller may have given up first; a boundary that came now could be in time to undo it.
    wait_for("the end of the update", lambda: torn(engine) is not None)
    engine.points.clear()
    wait_for("the word that it is torn", lambda: engine.engine.status().torn is not None)
    assert call.result(30)["meta_info"]["finish_reason"]["type"] == "abort"
    assert call.result(30)["output_ids"] == []
    assert not stuck or another.result(30)["output_ids"] == []
    with pytest.raises(weight_sync.TornWeightsError):
        generate(engine)
    publish(engine, NEXT, verify="overlapped")
    engine.serves(NEXT)
    stream.stop()


@pytest.mark.parametrize("rank", [0, 1])
def test_when_a_rank_dies_before_it_has_compared_nobody_gets_what_was_held(
    make_engine_with_faults: Callable[..., FaultyEngine], threads: ThreadPoolExecutor, rank: int
) -> None:
    engine = make_engine_with_faults(tp_size=2, keep_previous_weights=True)
    publish(engine, OLD)
    update, call = held_at(engine, 1, threads)
    kill_all([engine.pids[rank]])
    with pytest.raises(EngineDiedError):
        call.result(30)
    with pytest.raises(weight_sync.SyncError):
        update.result(30)
    wait_for("the end of its ranks", lambda: not any(map(is_alive, engine.pids)))
    engine.close()


def test_when_the_engine_is_shut_down_meanwhile_what_was_held_is_not_handed_out(
    make_engine_with_faults: Callable[..., FaultyEngine], threads: ThreadPoolExecutor
) -> None:
    engine = make_engine_with_faults(tp_size=2)
    publish(engine, OLD)
    pids = engine.pids
    update, call = held_at(engine, 1, threads)
    ended = threads.submit(engine.engine.shutdown)
    result = call.result(30)
    assert result["output_ids"] == []
    assert "shut down" in result["meta_info"]["finish_reason"]["message"]
    engine.points.clear()
    with pytest.raises(weight_sync.SyncError):
        update.result(60)
    ended.result(60)
    wait_for("the end of its ranks", lambda: not any(map(is_alive, pids)))
