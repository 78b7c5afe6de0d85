"""Parity with transformers when the engine runs in child processes, one rank or two.

Two ranks get what does not divide: one KV head, an odd vocabulary, biases, tied embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from versions import TOLERANCE, Reference, output_logprobs, pool_bytes, references, version_weights

import weight_sync
from rollout import Engine
from weight_sync import WeightPublisher

PROMPTS = [[7], [5, 9, 2], list(range(20, 61)), [11] * 23, [17, 40, 3, 99, 5, 5, 200, 31, 8]]
GREEDY = {"temperature": 0.0, "max_new_tokens": 24, "ignore_eos": True}
LAYOUTS: dict[str, tuple[int, str, dict[str, Any]]] = {
    "one-rank": (1, "qwen3", {"head_dim": 32}),
    "one-kv-head-odd-vocabulary-biases": (
        2,
        "llama",
        {"num_key_value_heads": 1, "vocab_size": 289, "attention_bias": True, "mlp_bias": True},
    ),
    "tied-odd-vocabulary-sliding": (
        2,
        "qwen2",
        {
            "tie_word_embeddings": True,
            "vocab_size": 291,
            "use_sliding_window": True,
            "sliding_window": 9,
            "max_window_layers": 1,
        },
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """An engine in child processes and what it should be."""

    engine: Engine
    folder: Path
    reference: Reference


@pytest.fixture(scope="module", params=LAYOUTS)
def setup(request: pytest.FixtureRequest, tiny_checkpoint: Callable[..., Path]) -> Iterator[Setup]:
    tp_size, family, overrides = LAYOUTS[request.param]
    folder = tiny_checkpoint(family, **overrides)
    options: dict[str, Any] = {"block_size": 4, "chunked_prefill_size": 16, "num_threads": 1}
    with Engine(
        folder,
        executor="local",
        tp_size=tp_size,
        skip_tokenizer_init=True,
        kv_cache_bytes=pool_bytes(folder, num_blocks=40, block_size=4, tp_size=tp_size),
        **options,
    ) as engine:
        yield Setup(engine=engine, folder=folder, reference=references()(folder))


def check(setup: Setup) -> int:
    """Greedy with retraction, a prefix hit, n samples; returns how often something was retracted."""
    results = setup.engine.generate(
        input_ids=PROMPTS * 2, sampling_params=GREEDY, return_logprob=True, logprob_start_len=0
    )
    for prompt, result in zip(PROMPTS * 2, results, strict=True):
        assert setup.reference.greedy_problem(prompt, result) is None
        if len(prompt) > 1:
            got = [value for value, _, _ in result["meta_info"]["input_token_logprobs"][1:]]
            expected = setup.reference.logprobs(prompt[:1], prompt[1:])
            assert got == pytest.approx(expected, abs=TOLERANCE)
    setup.engine.generate(input_ids=PROMPTS[2], sampling_params=GREEDY)
    found = setup.engine.generate(input_ids=PROMPTS[2], sampling_params=GREEDY, return_logprob=True)
    assert found["meta_info"]["cached_tokens"] == 40
    assert setup.reference.greedy_problem(PROMPTS[2], found) is None
    params = {"temperature": 0.8, "max_new_tokens": 9, "n": 3, "sampling_seed": 1}
    for sample in setup.engine.generate(
        input_ids=PROMPTS[4], sampling_params=params, return_logprob=True
    ):
        expected = setup.reference.logprobs(PROMPTS[4], sample["output_ids"], temperature=0.8)
        assert output_logprobs(sample) == pytest.approx(expected, abs=TOLERANCE)
    return sum(result["meta_info"]["num_retractions"] for result in results)


def test_ranks_in_child_processes_are_transformers_before_and_after_syncs_and_load_twice(
    setup: Setup,
) -> None:
    engine, folder = setup.engine, setup.folder
    setup.reference.at(0)
    assert check(setup) > 0
    cold = engine.weights_fingerprint()
    assert cold == weight_sync.fingerprint(version_weights(folder, 0))
    with WeightPublisher(engine.address) as publisher:
        for number in (1, 2):
            moved = version_weights(folder, number)
            report = publisher.publish(moved, label=f"v{number}")
            assert report.fingerprint == engine.weights_fingerprint()
            assert report.fingerprint == weight_sync.fingerprint(moved)
            setup.reference.at(number)
            check(setup)
        publisher.publish({name: torch.randn_like(tensor) for name, tensor in moved.items()})
    engine.update_weights_from_disk(folder)
    assert engine.weights_fingerprint() == cold
    for name, tensor in version_weights(folder, 0).items():
        assert engine.get_weights_by_name(name, truncate_size=1 << 20) == tensor.tolist(), name
    setup.reference.at(0)
    check(setup)
