"""What callers of an engine wait for, and for how long: deadlines, pauses, many calls on one event loop."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rollout import Engine
from rollout.errors import DeadlineExceeded

PROMPTS = [[5, 9, 2], [7] * 40]
GREEDY = {"temperature": 0.0, "max_new_tokens": 12, "ignore_eos": True}


@pytest.fixture(scope="module")
def engine(tiny_checkpoint: Callable[..., Path]) -> Iterator[Engine]:
    with Engine(tiny_checkpoint("qwen3", head_dim=32), kv_cache_bytes=4 << 20) as engine:
        yield engine


def test_a_deadline_hands_out_what_there_is_and_says_why_it_is_not_all(engine: Engine) -> None:
    params = [{**GREEDY, "max_new_tokens": n, "ignore_eos": True} for n in (2, 400)]
    engine.slow_down(
        0.02
    )  # The long one takes seconds, the short one none, however fast or busy the machine.
    results = engine.generate(
        input_ids=PROMPTS[:2], sampling_params=params, return_logprob=True, timeout_s=4.0
    )
    engine.slow_down(None)
    done, partial = (result["meta_info"] for result in results)
    assert done["finish_reason"] == {"type": "length", "length": 2}
    assert partial["finish_reason"]["type"] == "abort"
    assert "deadline has passed" in partial["finish_reason"]["message"]
    assert "1 of 2 samples had finished" in partial["finish_reason"]["message"]
    assert len(partial["output_token_logprobs"]) == partial["completion_tokens"] < 400
    *_, last = engine.generate(
        input_ids=PROMPTS[0],
        sampling_params={**GREEDY, "max_new_tokens": 500 - len(PROMPTS[0]), "ignore_eos": True},
        stream=True,
        timeout_s=0.2,
    )
    assert "deadline has passed" in last["meta_info"]["finish_reason"]["message"]
    assert engine.status().num_running == 0


def test_a_deadline_in_a_pause_names_the_pause_and_its_end(engine: Engine) -> None:
    engine.pause_generation("in_place", lease_s=20)
    try:
        assert 10 < (engine.status().pause_left_s or 0) <= 20
        result = engine.generate(input_ids=PROMPTS[0], sampling_params=GREEDY, timeout_s=0.2)
        message = result["meta_info"]["finish_reason"]["message"]
        assert "paused by pause_generation(mode='in_place') until" in message
        with pytest.raises(DeadlineExceeded, match=r"not all was computed.*paused by"):
            engine.sequence_logprobs([PROMPTS[0]], timeout_s=0.2)
        with pytest.raises(DeadlineExceeded, match=r"not all was computed.*paused by"):
            engine.score([1, 2], [[3]], [4], timeout_s=0.2)
        assert engine.status().num_waiting == 0
    finally:
        engine.continue_generation()


def test_calls_that_wait_hold_no_threads_of_the_event_loop(engine: Engine) -> None:
    """More of them than asyncio's pool has threads, and what ends them is one more."""

    async def run() -> list[Any]:
        loop = asyncio.get_running_loop()
        loop.set_default_executor(concurrent.futures.ThreadPoolExecutor(1))
        held = threading.Event()
        busy = loop.run_in_executor(None, held.wait, 30)
        await engine.async_pause_generation("in_place", lease_s=60)
        waiting = [
            asyncio.ensure_future(engine.async_sequence_logprobs([PROMPTS[0]])) for _ in range(8)
        ]
        waiting.append(asyncio.ensure_future(engine.async_score([1, 2], [[3]], [4])))
        await asyncio.sleep(0.1)
        assert not any(task.done() for task in waiting)
        await engine.async_continue_generation()
        results = await asyncio.wait_for(asyncio.gather(*waiting), 30)
        assert (await engine.async_status()).paused is None
        assert len(await engine.async_get_weights_by_name("model.norm.weight")) == 64
        assert await engine.async_get_weight_version() == "0"
        assert await engine.async_weights_fingerprint() == engine.weights_fingerprint()
        held.set()
        await busy
        return results

    *rows, scores = asyncio.run(run())
    assert all(row == engine.sequence_logprobs([PROMPTS[0]]) for row in rows)
    assert scores == engine.score([1, 2], [[3]], [4])


def test_nothing_asked_for_is_answered_with_nothing(engine: Engine) -> None:
    assert engine.generate([]) == []
    assert list(engine.generate([], stream=True)) == []
    assert engine.score([1], [], [2]) == []
    assert engine.sequence_logprobs([]) == []
    assert asyncio.run(engine.async_generate([])) == []
