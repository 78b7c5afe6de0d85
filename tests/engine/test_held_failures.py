"""What fails for a version that is not verified yet fails once it is, and never where that version is undone."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from rollout import Engine
from rollout.errors import EngineStepError, InvalidRequestError, NonFiniteLogitsError
from weight_sync.errors import FingerprintMismatch
from weight_sync.publisher.publisher import WeightPublisher
from weight_sync.receiver.commit import WeightCommit

PARAMS = {"temperature": 0.0, "max_new_tokens": 60, "ignore_eos": True}
OLDER, NEWER = [5, 9, 2], [7, 8, 30, 31]


@pytest.fixture(scope="module")
def folder(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("qwen3", head_dim=32)


@pytest.fixture(params=[False, True], ids=["in turn", "ahead"])
def engine(request: pytest.FixtureRequest, folder: Path) -> Iterator[Engine]:
    options: dict[str, Any] = {"overlap": request.param, "num_threads": 1}
    with Engine(folder, kv_cache_bytes=4 << 20, keep_previous_weights=True, **options) as engine:
        yield engine


@pytest.fixture
def nothing_left(engine: Engine) -> Iterator[None]:
    yield
    core = engine._executor._core  # type: ignore[attr-defined]
    until(lambda: engine.status().num_running == 0)
    core.scheduler.check_invariants()
    assert core.scheduler.requests == [] and not core.post.groups
    assert engine.status().num_free_blocks == engine.status().num_blocks
    assert len(engine.generate(input_ids=OLDER, sampling_params=PARAMS)["output_ids"]) == 60


def until(happened: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.001)


def call(engine: Engine, prompt: list[int], *, stream: bool = False, **more: Any) -> Any:
    found = engine.generate(
        input_ids=prompt,
        sampling_params={**PARAMS, "n": 3},
        return_logprob=True,
        logprob_start_len=0,
        stream=stream,
        **more,
    )
    if not stream:
        return found
    last: dict[int, Any] = {}
    for chunk in found:
        last[chunk.pop("index")] = chunk
    return [last[i] for i in range(3)]


@contextmanager
def held(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, value: float, *, right: bool
) -> Iterator[tuple[ThreadPoolExecutor, Future[Any]]]:
    """An older call, and a version whose last norm is `value`, which serves and is found `right`, or not, later."""
    looking, go_on, compare = threading.Event(), threading.Event(), WeightCommit._compare

    def look(commit: WeightCommit, first: Callable[[], None]) -> None:
        looking.set()
        assert go_on.wait(60)
        compare(commit, first)
        if not right:
            raise FingerprintMismatch("a test says so")

    monkeypatch.setattr(WeightCommit, "_compare", look)
    engine.slow_down(0.01)

    def publish() -> None:
        tensors = {"model.norm.weight": torch.full((64,), value)}
        options: dict[str, Any] = {"strict": False, "check_finite": False, "kv_policy": "keep"}
        with WeightPublisher(engine) as publisher:
            publisher.publish(tensors, verify="overlapped", **options)

    with ThreadPoolExecutor(4) as threads:
        older = threads.submit(call, engine, OLDER, stream=True, rid="older")
        until(lambda: engine.status().num_decoded_tokens > 9)
        update = threads.submit(publish)
        assert looking.wait(60)
        try:
            yield threads, older
        finally:
            go_on.set()
        engine.slow_down(0)
        if right:
            update.result(60)
        else:
            with pytest.raises(FingerprintMismatch, match="a test says so"):
                update.result(60)
            monkeypatch.undo()


def all_have_ended(engine: Engine) -> None:
    until(lambda: engine.status().num_running == engine.status().num_waiting == 0)


def have_failed(engine: Engine, num_calls: int) -> None:
    """So many calls have failed, and nobody has been told."""
    hold = engine._executor._core.post._hold  # type: ignore[attr-defined]
    until(lambda: sum(isinstance(news, Exception) for _, news in list(hold.news)) == num_calls)
    all_have_ended(engine)


@pytest.mark.parametrize("stream", [False, True])
def test_calls_go_on_where_the_version_whose_logits_were_not_finite_is_undone(
    engine: Engine, nothing_left: None, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    expected = [call(engine, prompt) for prompt in (OLDER, NEWER)]
    engine.flush_cache()
    with held(engine, monkeypatch, float("nan"), right=False) as (threads, older):
        newer = threads.submit(call, engine, NEWER, stream=stream)
        have_failed(engine, 2)
        assert not older.done() and not newer.done()
    for results, wanted in zip((older.result(60), newer.result(60)), expected, strict=True):
        for result, want in zip(results, wanted, strict=True):
            got, meta = want["meta_info"], result["meta_info"]
            assert result["output_ids"] == want["output_ids"]
            assert meta["finish_reason"] == {"type": "length", "length": 60}
            assert [span["number"] for span in meta["weight_versions"]] == [0]
            for name in ("input_token_logprobs", "output_token_logprobs"):
                values = [value for value, _, _ in meta[name]]
                assert values[1:] == pytest.approx([v for v, _, _ in got[name]][1:], abs=1e-4)


def test_calls_fail_once_the_version_whose_logits_are_not_finite_is_verified(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with held(engine, monkeypatch, float("nan"), right=True) as (threads, older):
        newer = threads.submit(call, engine, NEWER)
        have_failed(engine, 2)
        assert not older.done() and not newer.done()
    for failed in (older, newer):
        with pytest.raises(NonFiniteLogitsError, match="check the weights"):
            failed.result(60)
    assert engine.status().num_free_blocks == engine.status().num_blocks


def test_a_step_that_fails_under_a_version_that_is_undone_fails_nobody(
    engine: Engine, nothing_left: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = call(engine, OLDER)
    core = engine._executor._core  # type: ignore[attr-defined]
    launch = core.runner.launch

    def breaks(*arguments: Any) -> Any:
        if core.post.holding:
            raise RuntimeError("an index that only these weights make")
        return launch(*arguments)

    core.runner.launch = breaks
    with held(engine, monkeypatch, 1.0, right=False) as (_, older):
        have_failed(engine, 1)
    assert [r["output_ids"] for r in older.result(60)] == [r["output_ids"] for r in expected]
    with held(engine, monkeypatch, 1.0, right=True) as (_, older):
        have_failed(engine, 1)
    with pytest.raises(EngineStepError, match="only these weights"):
        older.result(60)


def test_the_id_of_a_request_that_may_have_to_go_on_is_in_use(
    engine: Engine, nothing_left: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = call(engine, OLDER)
    with held(engine, monkeypatch, 0.5, right=False) as (_, older):
        engine.slow_down(0)
        all_have_ended(engine)
        for rid in ("older-0", "older-2"):
            with pytest.raises(InvalidRequestError, match="in use"):
                engine.generate(input_ids=NEWER, sampling_params=PARAMS, rid=rid)
    assert [r["output_ids"] for r in older.result(60)] == [r["output_ids"] for r in expected]
