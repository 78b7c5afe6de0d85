"""Launching a step before the last one's tokens are known changes nothing that anybody sees."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rollout import Engine

PROMPTS = [[5, 9, 2], [7] * 40, [11, 12, 13, 14, 15, 16, 17], list(range(20, 53)), [3]]
KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0, "max_new_tokens": 31, "ignore_eos": True},
    {"temperature": 1.0, "max_new_tokens": 40, "sampling_seed": 1, "n": 3},
    {"temperature": 0.7, "top_p": 0.8, "top_k": 40, "max_new_tokens": 17, "sampling_seed": 2},
    {"temperature": 1.2, "max_new_tokens": 50, "sampling_seed": 3, "stop": ["e", "a"]},
    {
        "temperature": 1.0,
        "max_new_tokens": 33,
        "sampling_seed": 4,
        "min_new_tokens": 5,
        "frequency_penalty": 0.5,
        "repetition_penalty": 1.2,
        "logit_bias": {5: 3.0},
        "stop_token_ids": [5, 6, 7],
    },
    {"max_new_tokens": 0},
    {"max_new_tokens": 1, "temperature": 0.0},
]
BLOCK_BYTES = 2 * 4 * 2 * 2 * 32 * 4
"""Two layers, four tokens, keys and values of two heads of 32 float32."""


@pytest.fixture(scope="module")
def folder(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("qwen3", head_dim=32)


def everything(engine: Engine) -> list[dict[str, Any]]:
    """Every kind with every prompt, in one call."""
    pairs = [(prompt, kind) for kind in KINDS for prompt in PROMPTS]
    results: list[dict[str, Any]] = engine.generate(
        input_ids=[prompt for prompt, _ in pairs],
        sampling_params=[kind for _, kind in pairs],
        return_logprob=True,
    )
    return results


@pytest.fixture(scope="module")
def in_turn(folder: Path) -> list[dict[str, Any]]:
    with Engine(folder, overlap=False, kv_cache_bytes=4 << 20, block_size=4) as engine:
        return everything(engine)


@pytest.fixture(scope="module", params=[4096, 40], ids=["plenty of blocks", "few blocks"])
def ahead(request: pytest.FixtureRequest, folder: Path) -> Iterator[Engine]:
    with Engine(
        folder, overlap=True, kv_cache_bytes=request.param * BLOCK_BYTES, block_size=4
    ) as engine:
        yield engine


def test_tokens_ends_and_logprobs_are_the_same_one_step_ahead(
    in_turn: list[dict[str, Any]], ahead: Engine
) -> None:
    for expected, result in zip(in_turn, everything(ahead), strict=True):
        assert result["output_ids"] == expected["output_ids"]
        assert result["text"] == expected["text"]
        meta, wanted = result["meta_info"], expected["meta_info"]
        assert meta["finish_reason"] == wanted["finish_reason"]
        assert meta["weight_versions"] == wanted["weight_versions"]
        got, want = ([value for value, _, _ in m["output_token_logprobs"]] for m in (meta, wanted))
        assert got == pytest.approx(want, abs=1e-4)


def test_nothing_is_streamed_past_a_stop_and_every_block_comes_back(ahead: Engine) -> None:
    seen: list[int] = []
    for update in ahead.generate(
        input_ids=PROMPTS[0],
        sampling_params={**KINDS[4], "max_new_tokens": 100},
        stream=True,
    ):
        ids = update["output_ids"]
        assert ids[: len(seen)] == seen and -1 not in ids
        assert not any(token in (5, 6, 7) for token in ids[5:-1])
        seen = ids
    everything(ahead)
    status = ahead.status()
    assert status.num_running == status.num_waiting == 0
    assert status.num_free_blocks == status.num_blocks


def test_aborts_and_pauses_meet_no_token_that_is_still_pending(ahead: Engine) -> None:
    prompt, params = [4, 4, 4], {"temperature": 0.0, "ignore_eos": True, "max_new_tokens": 100}
    whole = ahead.generate(input_ids=prompt, sampling_params=params)["output_ids"]
    stream = ahead.generate(input_ids=prompt, sampling_params=params, stream=True, rid="x")
    next(stream)
    for mode in ("in_place", "retract"):
        ahead.pause_generation(mode=mode)
        ahead.continue_generation()
    ahead.abort_request("x")
    last = list(stream)[-1]
    assert whole[: len(last["output_ids"])] == last["output_ids"]
    assert torch.tensor(last["output_ids"]).min() >= 0


def test_input_logprobs_are_those_of_the_prompt_one_step_ahead(
    in_turn: list[dict[str, Any]], ahead: Engine, folder: Path
) -> None:
    options = {"return_logprob": True, "logprob_start_len": 0}
    params = [KINDS[0], KINDS[5], KINDS[1], KINDS[6]]
    results = ahead.generate(input_ids=PROMPTS[:4], sampling_params=params, **options)
    with Engine(folder, overlap=False, kv_cache_bytes=4 << 20) as engine:
        expected = engine.generate(input_ids=PROMPTS[:4], sampling_params=params, **options)
    for a, b in zip(results, expected, strict=True):
        got, want = ([v for v, _, _ in r["meta_info"]["input_token_logprobs"]][1:] for r in (a, b))
        assert got == pytest.approx(want, abs=1e-4)
