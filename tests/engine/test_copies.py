"""Copies of one prompt that arrive as requests of their own share its computation."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rollout import Engine

PROMPT = list(range(20, 90))
CALL = {"temperature": 0.0, "max_new_tokens": 6, "ignore_eos": True}


@pytest.fixture(scope="module")
def folder(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("qwen3", head_dim=32)


@pytest.fixture(scope="module", params=["inline", "ahead, in chunks", "two ranks"])
def engine(request: pytest.FixtureRequest, folder: Path) -> Iterator[Engine]:
    options: dict[str, Any] = {
        "inline": {},
        "ahead, in chunks": {"overlap": True, "chunked_prefill_size": 24},
        "two ranks": {"executor": "local", "tp_size": 2, "num_threads": 1},
    }[request.param]
    with Engine(folder, kv_cache_bytes=4 << 20, **options) as engine:
        yield engine


def at_once(engine: Engine, calls: list[dict[str, Any]], *, during: Any = None) -> list[Any]:
    """Results of calls that the engine finds waiting all together; `during` runs when it goes on."""

    async def run() -> list[Any]:
        await engine.async_pause_generation("in_place")
        tasks = [asyncio.create_task(engine.async_generate(**call)) for call in calls]
        num = sum(call["sampling_params"].get("n", 1) for call in calls)
        while (await engine.async_status()).num_waiting < num:
            await asyncio.sleep(0.01)
        if during is not None:
            await during()
        await engine.async_continue_generation()
        return await asyncio.gather(*tasks)

    return asyncio.run(run())


@pytest.mark.parametrize("n", [1, 3])
def test_seven_of_eight_copies_hit_the_cache(engine: Engine, n: int) -> None:
    engine.flush_cache()
    call = {"input_ids": PROMPT, "sampling_params": {**CALL, "n": n}}
    results = at_once(engine, [call] * 8)
    alone = engine.generate(**call)
    first = [result if n == 1 else result[0] for result in results]
    assert sorted(r["meta_info"]["cached_tokens"] for r in first) == [0, *[64] * 7]
    for result in results:
        if n == 1:
            assert result["output_ids"] == alone["output_ids"]
        else:
            assert [r["output_ids"] for r in result] == [r["output_ids"] for r in alone]


def test_copies_go_on_when_the_one_that_they_wait_for_is_aborted(engine: Engine) -> None:
    engine.flush_cache()
    call = {"input_ids": PROMPT, "sampling_params": CALL}
    calls = [{**call, "rid": f"copy {i}"} for i in range(4)]

    async def abort() -> None:
        assert await engine.async_abort_request("copy 0") == 1

    results = at_once(engine, calls, during=abort)
    assert results[0]["meta_info"]["finish_reason"]["type"] == "abort"
    assert len({tuple(r["output_ids"]) for r in results[1:]}) == 1
    assert sorted(r["meta_info"]["cached_tokens"] for r in results[1:]) == [0, 64, 64]


def test_copies_share_a_computation_in_a_pool_of_too_few_blocks(folder: Path) -> None:
    call = {"input_ids": PROMPT, "sampling_params": {**CALL, "max_new_tokens": 40}}
    with Engine(folder, kv_cache_bytes=9 * (16 << 10), chunked_prefill_size=32) as small:
        results = at_once(small, [call] * 5)
        alone = small.generate(**call)
    assert all(r["output_ids"] == alone["output_ids"] for r in results)
