"""`generate(min_weight_version=N)` computes nothing before version N serves, wherever the engine runs; and what results
tell of versions, log-probabilities and prompts on request."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rollout import Engine, RolloutPool
from rollout.errors import InvalidRequestError, NoUpdateYetError, TornWeightsError
from weight_sync.publisher.publisher import WeightPublisher
from weight_sync.receiver.commit import WeightCommit
from weight_sync.receiver.session import Session

GREEDY = {"temperature": 0.0, "max_new_tokens": 4, "ignore_eos": True}
LONG_S = 60.0
"""So that a test that fails does not wait for a version that never comes."""
OPTIONS: dict[str, Any] = {"kv_cache_bytes": 4 << 20, "num_threads": 1}


@pytest.fixture(scope="module")
def folder(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("qwen3", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def trainer(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def other_weights(model: Any, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: value.detach() + 0.05 * torch.randn(value.shape, generator=generator)
        for name, value in model.named_parameters()
    }


@pytest.fixture(scope="module", params=["inline", "local", "two ranks", "connected", "pool"])
def engine(request: pytest.FixtureRequest, folder: Path) -> Iterator[Engine]:
    kind = request.param
    if kind == "pool":
        with RolloutPool(folder, num_replicas=2, **OPTIONS) as pool:
            yield pool
    elif kind == "connected":
        with Engine(folder, **OPTIONS) as owner, Engine.connect(owner.address) as engine:
            yield engine
    else:
        more = {"executor": "local", "tp_size": 2} if kind == "two ranks" else {"executor": kind}
        with Engine(folder, **OPTIONS, **more) as engine:
            yield engine


def waits(engine: Engine, num_samples: int) -> None:
    """Return once so many samples wait."""
    end = time.monotonic() + 30.0
    while engine.status().num_waiting < num_samples:
        assert time.monotonic() < end, "the call does not wait"
        time.sleep(0.005)


def test_a_call_waits_for_its_version_and_others_pass_it(engine: Engine, trainer: Any) -> None:
    served = engine.version
    with ThreadPoolExecutor(1) as threads:
        early = threads.submit(
            engine.generate,
            input_ids=[[5, 9, 2], [7, 7]],
            sampling_params=GREEDY | {"n": 2},
            min_weight_version=served + 2,
            timeout_s=LONG_S,
            return_token_versions=True,
        )
        waits(engine, 4)
        at_once = engine.generate(
            input_ids=[5, 9, 2], sampling_params=GREEDY, min_weight_version=served
        )
        assert at_once["meta_info"]["weight_version_number"] == served
        engine.publish(other_weights(trainer, 1))
        waits(engine, 4)
        assert not early.done()
        report = engine.publish(other_weights(trainer, 2), label="later")
        results = early.result(60)
    for result in results:
        [span] = result["meta_info"]["weight_versions"]
        assert span == {"version": "later", "number": report.version, "start": 0, "end": 4}
        assert result["meta_info"]["token_versions"] == [served + 2] * 4


def test_a_stream_and_an_awaited_call_wait_too(engine: Engine, trainer: Any) -> None:
    least = engine.version + 1
    stream = engine.generate(
        input_ids=[5, 9],
        sampling_params=GREEDY,
        stream=True,
        min_weight_version=least,
        timeout_s=LONG_S,
        return_token_versions=True,
    )

    wanted: dict[str, Any] = {
        "input_ids": [5, 9],
        "sampling_params": GREEDY,
        "min_weight_version": least,
        "timeout_s": LONG_S,
    }

    async def chunks_of_a_stream() -> list[Any]:
        return [chunk async for chunk in await engine.async_generate(**wanted, stream=True)]

    async def awaited() -> tuple[Any, list[Any]]:
        return await asyncio.gather(engine.async_generate(**wanted), chunks_of_a_stream())

    with ThreadPoolExecutor(2) as threads:
        streamed = threads.submit(lambda: list(stream))
        others = threads.submit(asyncio.run, awaited())
        waits(engine, 3)
        engine.publish(other_weights(trainer, 3))
        chunks, (single, async_chunks) = streamed.result(60), others.result(60)
    assert single["output_ids"] == chunks[-1]["output_ids"] == async_chunks[-1]["output_ids"]
    for chunk in chunks:
        meta = chunk["meta_info"]
        assert meta["token_versions"] == [least] * len(chunk["output_ids"])
        assert {span["number"] for span in meta["weight_versions"]} == {least}


def test_the_deadline_ends_the_wait_in_words(engine: Engine) -> None:
    served = engine.version
    result = engine.generate(
        input_ids=[5, 9],
        sampling_params=GREEDY,
        timeout_s=0.2,
        min_weight_version=served + 7,
        return_token_versions=True,
    )
    reason = result["meta_info"]["finish_reason"]
    assert reason["type"] == "abort" and result["output_ids"] == []
    assert f"waited for weight version {served + 7}, got {served}" in reason["message"]
    assert result["meta_info"]["token_versions"] == []
    assert engine.status().num_waiting == 0


def test_a_waiting_call_can_be_aborted_and_hinders_no_flush(engine: Engine) -> None:
    with ThreadPoolExecutor(1) as threads:
        call = threads.submit(
            engine.generate,
            input_ids=[5, 9],
            sampling_params=GREEDY,
            rid="early",
            min_weight_version=engine.version + 1,
            timeout_s=LONG_S,
        )
        waits(engine, 1)
        engine.flush_cache()
        assert engine.abort_request("early") == 1
        assert call.result(30)["meta_info"]["finish_reason"]["type"] == "abort"


def test_a_bad_number_and_a_bad_prompt_are_refused_at_once(engine: Engine) -> None:
    for bad in ("17", -1, 1.5, True, 1 << 63):
        with pytest.raises(InvalidRequestError, match="min_weight_version"):
            engine.generate(input_ids=[5], sampling_params=GREEDY, min_weight_version=bad)  # type: ignore[arg-type]
    if isinstance(engine, RolloutPool):
        return  # A replica checks a prompt when it gets it.
    with pytest.raises(InvalidRequestError, match="vocabulary"):
        engine.generate(
            input_ids=[100_000], sampling_params=GREEDY, min_weight_version=engine.version + 1
        )


@pytest.mark.parametrize("replicas", [0, 2])
def test_it_waits_for_the_first_update_and_for_a_repair(
    folder: Path, trainer: Any, replicas: int
) -> None:
    options = {**OPTIONS, "load_format": "dummy"}
    make: Callable[..., Engine] = Engine
    if replicas:
        make, options = RolloutPool, {**options, "num_replicas": replicas}
    with make(folder, **options) as engine, ThreadPoolExecutor(1) as threads:
        with pytest.raises(NoUpdateYetError):
            engine.generate(input_ids=[5, 9], sampling_params=GREEDY)
        for _ in range(2):
            least = engine.version + 1
            call = threads.submit(
                engine.generate,
                input_ids=[5, 9],
                sampling_params=GREEDY,
                min_weight_version=least,
                timeout_s=LONG_S,
            )
            waits(engine, 1)
            engine.publish(trainer)
            assert call.result(60)["meta_info"]["weight_versions"][0]["number"] >= least
            engine.release_memory_occupation(["weights"])
            with pytest.raises(TornWeightsError):
                engine.generate(input_ids=[5, 9], sampling_params=GREEDY)
            engine.resume_memory_occupation(["weights"])


def test_a_version_that_turns_out_wrong_serves_nobody(
    folder: Path, trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Overlapped verification: what waited for a version must not run on the one that it is undone to."""
    with Engine(folder, keep_previous_weights=True, **OPTIONS) as engine:
        checked, go_on = threading.Event(), threading.Event()

        def compare(self: Any, *args: Any) -> None:
            checked.set()
            assert go_on.wait(30)
            raise RuntimeError("a test says no")

        monkeypatch.setattr(WeightCommit, "_compare", compare)
        with ThreadPoolExecutor(2) as threads:
            call = threads.submit(
                engine.generate,
                input_ids=[5, 9],
                sampling_params=GREEDY,
                min_weight_version=1,
                timeout_s=LONG_S,
            )
            waits(engine, 1)
            update = threads.submit(engine.publish, other_weights(trainer, 4), verify="overlapped")
            assert checked.wait(30)
            waits(engine, 1)
            go_on.set()
            with pytest.raises(Exception, match="a test says no"):
                update.result(30)
            waits(engine, 1)
            monkeypatch.undo()
            engine.publish(trainer)
            meta = call.result(30)["meta_info"]
        assert meta["weight_versions"][0]["number"] == engine.version


@pytest.mark.parametrize("verify", ["pause", "overlapped"])
def test_a_version_that_was_not_kept_gives_its_name_to_nothing(
    folder: Path, trainer: Any, monkeypatch: pytest.MonkeyPatch, verify: Any
) -> None:
    """The engine was told of it before it turned out wrong; what is torn is still called the last whole version."""

    def compare(self: Any, found: Any, indices: Any, declared: Any, where: str) -> None:
        if where == "resident":
            raise RuntimeError("a test says no")

    with Engine(folder, **OPTIONS) as engine, ThreadPoolExecutor(2) as threads:
        served = engine.publish(trainer, version=3, label="three")
        monkeypatch.setattr(Session, "compare", compare)
        engine.pause_generation("in_place", lease_s=60)
        old = threads.submit(engine.generate, input_ids=[5, 9], sampling_params=GREEDY)
        waits(engine, 1)
        with pytest.raises(TornWeightsError, match="a test says no"):
            engine.publish(other_weights(trainer, 5), version=7, label="seven", verify=verify)
        meta = old.result(30)["meta_info"]
        status = engine.status()
        assert (status.version, status.weight_version) == (3, "three")
        assert (meta["finish_reason"]["type"], meta["weight_version"]) == ("abort", "three")
        later = threads.submit(
            engine.generate,
            input_ids=[5, 9],
            sampling_params=GREEDY,
            min_weight_version=served.version + 1,
            timeout_s=LONG_S,
        )
        waits(engine, 1)
        monkeypatch.undo()
        engine.continue_generation()
        engine.publish(trainer, version=8)
        assert later.result(30)["meta_info"]["weight_versions"][0]["number"] == 8


def test_flat_log_probabilities_versions_and_prompt_ids_come_on_request(
    engine: Engine, trainer: Any
) -> None:
    plain = engine.generate("the end", GREEDY, return_logprob=True)
    assert "prompt_token_ids" not in plain
    assert plain["meta_info"].keys().isdisjoint(("output_logprobs", "token_versions"))
    result = engine.generate(
        ["the end", "in"],
        GREEDY,
        flat_logprobs=True,
        return_token_versions=True,
        return_prompt_token_ids=True,
    )[0]
    tokenizer = engine.tokenizer
    assert result["prompt_token_ids"] == tokenizer("the end")["input_ids"]
    assert list(result) == ["text", "output_ids", "prompt_token_ids", "meta_info"]
    meta = result["meta_info"]
    assert meta["output_logprobs"] == [value for value, _, _ in meta["output_token_logprobs"]]
    assert len(meta["output_logprobs"]) == len(result["output_ids"]) == 4
    assert meta["token_versions"] == [engine.version] * 4


def test_two_versions_inside_one_output_are_two_numbers(folder: Path, trainer: Any) -> None:
    with Engine(folder, **OPTIONS) as engine, WeightPublisher(engine) as publisher:
        stream = engine.generate(
            input_ids=[5, 9],
            sampling_params={**GREEDY, "max_new_tokens": 200},
            stream=True,
            return_token_versions=True,
        )
        chunk = next(stream)
        for _ in range(2):
            publisher.publish(other_weights(trainer, 5), label="same")
        for last in stream:
            chunk = last
        meta = chunk["meta_info"]
        numbers = meta["token_versions"]
        assert numbers == sorted(numbers) and len(numbers) == 200
        assert [s["number"] for s in meta["weight_versions"]] == sorted(set(numbers))
        assert len(meta["weight_versions"]) > 1
