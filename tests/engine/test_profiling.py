"""Profiles and frozen garbage: commands like any other, in this process and in a child."""

from __future__ import annotations

import asyncio
import gc
import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rollout import Engine
from rollout.errors import RolloutError
from weight_sync import WeightPublisher


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
    names = names_in(engine.stop_profile())
    assert names.count("extend: 1 requests, 3 tokens") == 1
    assert names.count("decode: 1 requests, 1 tokens") == 3
    assert names.count("sampler") == names.count("take in the tokens") == 4
    launched = 1 if torch.cuda.is_available() else 4  # there decodes are graphs, without ranges
    assert names.count("attention") == names.count("ffn") == 2 * launched
    assert names.count("norm") == 5 * launched  # two layers of two, and one behind them


def test_a_profile_that_is_asked_for_by_address_names_the_phases_of_an_update(
    engine: Engine, tiny_checkpoint: Callable[..., Path], reference_model: Callable[[Path], Any]
) -> None:
    weights = dict(reference_model(tiny_checkpoint("llama")).named_parameters())
    with WeightPublisher(engine.address) as publisher, Engine.connect(engine.address) as remote:
        remote.start_profile()
        publisher.publish(weights.items())
        names = names_in(remote.stop_profile())
    assert names.count("commit") == names.count("verify") == 1
    assert names.count("stage") >= 1
    assert ("pack" in names) == (engine.config.executor == "inline")


def test_another_profile_in_the_process_is_not_disturbed(engine: Engine) -> None:
    if engine.config.executor != "inline":
        engine.start_profile()
    with torch.profiler.profile() as own, torch.profiler.record_function("own"):
        if engine.config.executor == "inline":
            with pytest.raises(RolloutError, match="got one of torch's under way in this process"):
                engine.start_profile()
    assert any(event.name == "own" for event in own.events())
    if engine.config.executor != "inline":
        names_in(engine.stop_profile())


def names_in(trace: str) -> list[str]:
    path = Path(trace)
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    path.unlink()
    path.parent.rmdir()
    return [event.get("name", "") for event in events]


def test_garbage_can_be_frozen_and_the_engine_goes_on(engine: Engine) -> None:
    engine.freeze_gc()
    asyncio.run(engine.async_freeze_gc())
    with Engine.connect(engine.address) as remote:
        remote.freeze_gc()
    params = {"max_new_tokens": 2, "ignore_eos": True}
    assert len(engine.generate(input_ids=[5], sampling_params=params)["output_ids"]) == 2
    gc.unfreeze()  # this process goes on to other tests
