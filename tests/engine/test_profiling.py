"""Profiles and frozen garbage: commands like any other, in this process and in a child."""

from __future__ import annotations

import asyncio
import gc
import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rollout import Engine
from rollout.errors import RolloutError


@pytest.fixture(scope="module", params=["inline", "local"])
def engine(
    request: pytest.FixtureRequest, tiny_checkpoint: Callable[..., Path]
) -> Iterator[Engine]:
    with Engine(
        tiny_checkpoint("llama"), executor=request.param, kv_cache_bytes=4 << 20, num_threads=1
    ) as engine:
        yield engine


def test_a_profile_names_the_parts_of_the_steps_between_start_and_stop(engine: Engine) -> None:
    with pytest.raises(RolloutError, match="cannot stop a profile"):
        engine.stop_profile()
    engine.start_profile()
    with pytest.raises(RolloutError, match="cannot start a profile"):
        engine.start_profile()
    engine.generate(input_ids=[1, 2, 3], sampling_params={"max_new_tokens": 4, "ignore_eos": True})
    path = Path(engine.stop_profile())
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    names = [event.get("name", "") for event in events]
    assert names.count("launch 1 requests, 3 tokens") == 1
    assert names.count("launch 1 requests, 1 tokens") == 3
    assert names.count("take in the tokens") == 4
    path.unlink()
    path.parent.rmdir()


def test_garbage_can_be_frozen_and_the_engine_goes_on(engine: Engine) -> None:
    engine.freeze_gc()
    asyncio.run(engine.async_freeze_gc())
    params = {"max_new_tokens": 2, "ignore_eos": True}
    assert len(engine.generate(input_ids=[5], sampling_params=params)["output_ids"]) == 2
    gc.unfreeze()  # this process goes on to other tests
