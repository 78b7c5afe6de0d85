"""One engine of two ranks against one of one rank: the same tokens, whatever the sampling, and the same manners."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from versions import TOLERANCE, output_logprobs

from rollout import Engine
from rollout.engine.executors import rank_process
from rollout.engine.loop.ranks import RankSpec, device_of
from rollout.errors import ConfigError, InvalidRequestError
from weight_sync.errors import EngineDiedError

PROMPTS = [[5, 9, 2], [7] * 40, [11, 12, 13, 14, 15, 16, 17], list(range(20, 53))]
LONG = {"temperature": 0.0, "max_new_tokens": 200, "ignore_eos": True}


@pytest.fixture(scope="module")
def folder(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("qwen3", head_dim=32, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def one(folder: Path) -> Iterator[Engine]:
    with Engine(folder, kv_cache_bytes=4 << 20, seed=0) as engine:
        yield engine


@pytest.fixture(scope="module")
def two(folder: Path) -> Iterator[Engine]:
    with Engine(
        folder, executor="local", tp_size=2, kv_cache_bytes=2 << 20, num_threads=1, seed=0
    ) as engine:
        yield engine


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.0, "sampling_seed": 3, "n": 3},
        {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "sampling_seed": 4, "n": 2},
        {"temperature": 1.2, "min_p": 0.02, "repetition_penalty": 1.3, "sampling_seed": 5},
        {"temperature": 0.9, "frequency_penalty": 0.5, "presence_penalty": 0.5},
    ],
    ids=["plain", "filtered", "penalties", "engine-seed"],
)
def test_seeds_draw_the_same_tokens_with_one_rank_and_with_two(
    one: Engine, two: Engine, params: dict[str, Any]
) -> None:
    params = {"max_new_tokens": 20, "ignore_eos": True, **params}
    results = [
        engine.generate(
            input_ids=PROMPTS,
            sampling_params=params,
            return_logprob=True,
            top_logprobs_num=2,
            rid=[f"{i}" for i in range(len(PROMPTS))],
        )
        for engine in (one, two)
    ]
    for alone, together in zip(*results, strict=True):
        assert alone["output_ids"] == together["output_ids"]
        assert output_logprobs(together) == pytest.approx(output_logprobs(alone), abs=TOLERANCE)
        for a, b in zip(
            *(r["meta_info"]["output_top_logprobs"] for r in (alone, together)), strict=True
        ):
            assert [token for _, token, _ in a] == [token for _, token, _ in b]


def test_stop_strings_and_scores_are_the_same_with_two_ranks(one: Engine, two: Engine) -> None:
    text = one.generate("the cat", {**LONG, "max_new_tokens": 20})["text"]
    params = {**LONG, "max_new_tokens": 20, "stop": text[3:6]}
    cut = [engine.generate("the cat", params) for engine in (one, two)]
    assert cut[0]["text"] == cut[1]["text"] == text[: text.index(text[3:6])]
    rows = [engine.score([5, 6, 7], [[8], [9, 10]], [3, 77]) for engine in (one, two)]
    for alone, together in zip(*rows, strict=True):
        assert together == pytest.approx(alone, rel=1e-3)


def test_a_refused_request_leaves_both_ranks_in_step(one: Engine, two: Engine) -> None:
    for bad in ([], [999_999], [1] * 5_000):
        with pytest.raises(InvalidRequestError):
            two.generate(input_ids=bad, sampling_params=LONG)
    params = {**LONG, "max_new_tokens": 10}
    expected = one.generate(input_ids=PROMPTS[1], sampling_params=params)["output_ids"]
    assert two.generate(input_ids=PROMPTS[1], sampling_params=params)["output_ids"] == expected


def start_long(engine: Engine, rid: str) -> tuple[threading.Thread, list[dict[str, Any]]]:
    """A long streaming request on a thread of its own; returns when its first token has come.

    The engine is slow from then on, so that the request runs for as long as a test may take to do something about it.
    """
    started, chunks = threading.Event(), []
    engine.slow_down(0.02)

    def run() -> None:
        for chunk in engine.generate(
            input_ids=PROMPTS[0], sampling_params=LONG, stream=True, rid=rid
        ):
            chunks.append(chunk)
            started.set()

    thread = threading.Thread(target=run)
    thread.start()
    assert started.wait(30)
    return thread, chunks


@pytest.mark.parametrize("mode", ["retract", "in_place", "abort"])
def test_pauses_and_aborts_reach_both_ranks(one: Engine, two: Engine, mode: Any) -> None:
    expected = one.generate(input_ids=PROMPTS[0], sampling_params=LONG)["output_ids"]
    thread, chunks = start_long(two, mode)
    assert two.pause_generation(mode) == (0 if mode == "in_place" else 1)
    if mode != "abort":
        assert thread.is_alive()
    two.continue_generation()
    two.slow_down(None)
    thread.join(300)
    output = chunks[-1]["output_ids"]
    assert output == expected[: len(output)]
    assert (len(output) < 200) == (mode == "abort")
    thread, chunks = start_long(two, f"again-{mode}")
    assert two.abort_request(f"again-{mode}") == 1
    thread.join(300)
    two.slow_down(None)
    assert chunks[-1]["meta_info"]["finish_reason"]["type"] == "abort"
    two.flush_cache()
    status = two.status()
    assert (status.num_running, status.num_waiting) == (0, 0)


def test_a_pause_of_two_ranks_ends_with_its_lease(one: Engine, two: Engine) -> None:
    two.pause_generation("in_place", lease_s=0.2)
    params = {**LONG, "max_new_tokens": 10}
    expected = one.generate(input_ids=PROMPTS[3], sampling_params=params)["output_ids"]
    assert two.generate(input_ids=PROMPTS[3], sampling_params=params)["output_ids"] == expected
    assert two.status().paused is None


def test_a_request_whose_deadline_passes_leaves_both_ranks_in_step(
    one: Engine, two: Engine
) -> None:
    results = two.generate(input_ids=PROMPTS[:2] * 8, sampling_params=LONG, timeout_s=0.15)
    assert {result["meta_info"]["finish_reason"]["type"] for result in results} == {"abort"}
    params = {**LONG, "max_new_tokens": 10}
    expected = one.generate(input_ids=PROMPTS[3], sampling_params=params)["output_ids"]
    assert two.generate(input_ids=PROMPTS[3], sampling_params=params)["output_ids"] == expected


def test_many_calls_that_end_at_once_leave_both_ranks_in_step(one: Engine, two: Engine) -> None:
    """The ranks give the blocks of eight calls back in one order, or the next prompts meet unlike caches."""
    for attempt in range(3):
        streams = [start_long(two, f"{attempt}-{i}") for i in range(8)]
        filler = threading.Thread(
            target=two.generate, kwargs={"input_ids": [3] * 300, "sampling_params": LONG}
        )
        filler.start()
        two.abort_request(abort_all=True)
        for thread, chunks in streams:
            thread.join(300)
            assert chunks[-1]["meta_info"]["finish_reason"]["type"] == "abort"
        two.abort_request(abort_all=True)
        filler.join(300)
    two.slow_down(None)
    params = {**LONG, "max_new_tokens": 10}
    expected = [r["output_ids"] for r in one.generate(input_ids=PROMPTS, sampling_params=params)]
    got = [r["output_ids"] for r in two.generate(input_ids=PROMPTS, sampling_params=params)]
    assert got == expected


def test_a_rank_that_does_not_start_ends_the_start_of_all(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other rank waits for it, and would do so until the deadline."""
    started: list[subprocess.Popen[bytes]] = []

    class Popen(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, command: list[str], **options: Any) -> None:
            fails = [sys.executable, "-c", "raise SystemExit(3)"]
            super().__init__(fails if started else command, **options)
            started.append(self)

    monkeypatch.setattr(
        rank_process, "subprocess", SimpleNamespace(**{**vars(subprocess), "Popen": Popen})
    )
    start = time.monotonic()
    with pytest.raises(EngineDiedError, match=r"rank 1 ended while starting \(exit code 3"):
        Engine(folder, executor="local", tp_size=2, kv_cache_bytes=2 << 20, num_threads=1)
    assert time.monotonic() - start < 30.0
    assert all(process.poll() is not None for process in started)


def test_more_ranks_than_gpus_are_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert device_of(RankSpec(rank=0, size=2), "auto") == "cuda:0"
    with pytest.raises(ConfigError, match="rank 1 of 2, expected at most 1 ranks"):
        device_of(RankSpec(rank=1, size=2), "auto")
    with pytest.raises(ConfigError, match="'cuda:3'"):
        device_of(RankSpec(), "cuda:3")
    assert device_of(RankSpec(rank=1, size=2), "cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match="'cuda', expected 'cpu': this process sees no GPU"):
        device_of(RankSpec(), "cuda")
