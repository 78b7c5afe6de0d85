"""Calls that ask for very much: bounded, made into requests piece by piece, and nobody else waits for them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rollout import Engine
from rollout.engine.loop.opening import BACKLOG, PIECE, Opening, SentPrompt
from rollout.errors import InvalidRequestError
from rollout.protocol.commands import Generate, PromptSpec
from rollout.sampling_params import SamplingParams
from rollout.scheduling import Request

NUM = 2400
SHORT = {"temperature": 0.0, "max_new_tokens": 1, "ignore_eos": True}


@pytest.fixture(scope="module")
def engine(tiny_checkpoint: Callable[..., Path]) -> Iterator[Engine]:
    folder = tiny_checkpoint("qwen3", head_dim=32)
    with Engine(folder, kv_cache_bytes=4 << 20, max_running_requests=64) as engine:
        yield engine


def in_background(call: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    outcome: list[Any] = []
    thread = threading.Thread(target=lambda: outcome.append(call()))
    thread.start()
    return thread, outcome


def test_more_samples_than_a_call_may_have_are_refused_at_once(engine: Engine) -> None:
    start = time.monotonic()
    with pytest.raises(InvalidRequestError, match=r"1638400 samples.*expected at most 65536"):
        engine.generate(input_ids=[[5]] * 100, sampling_params={**SHORT, "n": 16_384})
    spec = [
        PromptSpec(rid=f"r{i}", input_ids=[5], params=SamplingParams(n=16_384)) for i in range(100)
    ]
    future = engine._executor.submit(Generate(prompts=spec), timeout_s=30)
    with pytest.raises(InvalidRequestError, match="1638400 samples"):
        future.result(30)
    assert time.monotonic() - start < 30


def test_a_huge_call_holds_nobody_up_and_has_few_requests_at_a_time(engine: Engine) -> None:
    scheduler = engine._executor._core.scheduler  # type: ignore[attr-defined]
    params = {**SHORT, "max_new_tokens": 4, "n": NUM // 2}
    thread, outcome = in_background(
        lambda: engine.generate(input_ids=[[5, 6], [7]], sampling_params=params)
    )
    while not scheduler.num_waiting:
        time.sleep(0.002)
    most = 0
    while thread.is_alive():
        most = max(most, scheduler.num_waiting + scheduler.num_running)
        engine.status()
        time.sleep(0.005)
    assert 0 < most <= BACKLOG + PIECE + 64
    [results] = outcome
    assert len(results) == NUM and len({r["meta_info"]["id"] for r in results}) == NUM
    for first in (0, NUM // 2):
        assert len({tuple(r["output_ids"]) for r in results[first : first + NUM // 2]}) == 1


def test_what_has_not_begun_ends_with_the_others(engine: Engine) -> None:
    engine.pause_generation("in_place", lease_s=60)
    try:
        thread, outcome = in_background(
            lambda: engine.generate(input_ids=[5, 6], sampling_params={**SHORT, "n": NUM}, rid="x")
        )
        while engine.status().num_waiting < NUM:
            time.sleep(0.005)
        with pytest.raises(InvalidRequestError, match="in use"):
            engine.generate(input_ids=[5], sampling_params=SHORT, rid=f"x-{NUM - 1}")
        assert engine.abort_request(f"x-{NUM - 1}") == 1
        assert engine.abort_request(f"x-{NUM - 1}") == 0
        assert engine.abort_request("x") == NUM - 1
        thread.join(30)
    finally:
        engine.continue_generation()
    [results] = outcome
    assert [r["meta_info"]["finish_reason"]["type"] for r in results] == ["abort"] * NUM
    assert engine.status().num_waiting == 0


def make(part: SentPrompt, count: int, twin: Request | None) -> list[Request]:
    return [
        Request(rid=part.rid(i), prompt_ids=part.spec.input_ids, params=part.spec.params)
        for i in range(part.done, part.done + count)
    ]


def opening(*nums: int) -> Opening:
    """One prompt that is asked for in parts of so many samples."""
    parts, first = [], 0
    for i, num in enumerate(nums):
        spec = PromptSpec(rid=f"p{i}", input_ids=[5], params=SamplingParams(n=num))
        parts.append(SentPrompt(spec, first, i))
        first += num
    return Opening([parts], make)


def test_samples_are_taken_in_order_whatever_the_pieces() -> None:
    pieces = opening(3, 1, 2)
    taken = [[r.rid for r in pieces.take(2)] for _ in range(4)]
    assert taken == [["p0-0", "p0-1"], ["p0-2", "p1"], ["p2-0", "p2-1"], []]
    assert pieces.num_left == 0


def test_a_sample_ends_once_under_each_of_its_names() -> None:
    pieces = opening(4, 1)
    pieces.take(1)
    assert pieces.holds("p0-1") and pieces.holds("p1")
    assert not any(pieces.holds(rid) for rid in ("p0-0", "p0", "p0-4", "p0-01", "p1-0", "p2"))
    assert pieces.end("one", ["p0-2", "p9"]) == 1
    assert pieces.end("prompt", ["p0"]) == 2
    assert pieces.end("all") == 1 and pieces.end("again") == 0
    reasons = {r.rid: pieces.why_ended(r) for r in pieces.take(9)}
    assert reasons == {"p0-1": "prompt", "p0-2": "one", "p0-3": "prompt", "p1": "all"}
