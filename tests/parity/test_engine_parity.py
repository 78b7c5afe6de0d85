"""Every family through the public `Engine`, in one small engine each: what it says is what transformers says.

Steps of 16 tokens cut prompts into chunks; the KV pool holds fewer tokens than the requests need, so that some are
retracted; prompts share beginnings, so that prefixes are found. All of it once before and once after a sync.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from versions import TOLERANCE, Reference, output_logprobs, pool_bytes, references, version_weights

import weight_sync
from rollout import Engine
from weight_sync import WeightPublisher

BLOCK_SIZE = 4
SHARED = [17, 40, 3, 99, 5, 5, 200, 31, 8]
PROMPTS = [[7], [5, 9, 2], [*SHARED, 60, 61], [*SHARED, 90], list(range(20, 61)), [11] * 23]
GREEDY = {"temperature": 0.0, "max_new_tokens": 14, "ignore_eos": True}


@pytest.fixture(scope="module")
def reference() -> Callable[[Path], Reference]:
    return references()


def small_engine(folder: Path, **options: Any) -> Engine:
    return Engine(
        folder,
        skip_tokenizer_init=True,
        block_size=BLOCK_SIZE,
        kv_cache_bytes=pool_bytes(folder, num_blocks=40, block_size=BLOCK_SIZE),
        chunked_prefill_size=16,
        **options,
    )


def check_everything(engine: Engine, reference: Reference) -> None:
    """Greedy and sampled outputs, input log-probabilities, and a second time from the prefix cache."""
    results = engine.generate(
        input_ids=PROMPTS, sampling_params=GREEDY, return_logprob=True, logprob_start_len=0
    )
    assert sum(result["meta_info"]["num_retractions"] for result in results) > 0
    for prompt, result in zip(PROMPTS, results, strict=True):
        assert reference.greedy_problem(prompt, result) is None
        inputs = result["meta_info"]["input_token_logprobs"]
        assert [token for _, token, _ in inputs] == prompt
        if len(prompt) > 1:
            expected = reference.logprobs(prompt[:1], prompt[1:])
            assert [value for value, _, _ in inputs[1:]] == pytest.approx(expected, abs=TOLERANCE)
    again = engine.generate(input_ids=PROMPTS[4], sampling_params=GREEDY, return_logprob=True)
    assert reference.greedy_problem(PROMPTS[4], again) is None
    third = engine.generate(input_ids=PROMPTS[4], sampling_params=GREEDY, return_logprob=True)
    assert third["meta_info"]["cached_tokens"] == 40
    assert reference.greedy_problem(PROMPTS[4], third) is None
    params = {"temperature": 0.8, "max_new_tokens": 9, "n": 3, "sampling_seed": 1}
    samples = engine.generate(input_ids=PROMPTS[2:4], sampling_params=params, return_logprob=True)
    for i, sample in enumerate(samples):
        expected = reference.logprobs(PROMPTS[2 + i // 3], sample["output_ids"], temperature=0.8)
        assert output_logprobs(sample) == pytest.approx(expected, abs=TOLERANCE)


def resident(engine: Engine) -> dict[str, torch.Tensor]:
    model = engine._executor._core.runner.model  # type: ignore[attr-defined]
    return dict(model.named_parameters())


def test_a_family_is_transformers_before_and_after_a_sync_and_loads_twice(
    variant_folder: Path, reference: Callable[[Path], Reference]
) -> None:
    with small_engine(variant_folder) as engine:
        check_everything(engine, reference(variant_folder).at(0))
        cold = {name: tensor.clone() for name, tensor in resident(engine).items()}
        fingerprint = engine.weights_fingerprint()
        moved = version_weights(variant_folder, 1)
        with WeightPublisher(engine) as publisher:
            report = publisher.publish(moved)
        assert report.fingerprint == engine.weights_fingerprint() == weight_sync.fingerprint(moved)
        check_everything(engine, reference(variant_folder).at(1))
        noise = {name: torch.randn_like(tensor) for name, tensor in moved.items()}
        engine.update_weights_from_tensor(noise)
        assert engine.weights_fingerprint() != fingerprint
        engine.update_weights_from_disk(variant_folder)
        assert engine.weights_fingerprint() == fingerprint
        for name, tensor in resident(engine).items():
            assert torch.equal(tensor.view(torch.int32), cold[name].view(torch.int32)), name
        check_everything(engine, reference(variant_folder).at(0))
