"""Reward models: scores of a sequence-classification checkpoint are those of transformers, before and after a sync."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from versions import pool_bytes

from rollout import Engine, RolloutPool
from rollout.errors import InvalidRequestError
from weight_sync import WeightPublisher, fingerprint
from weight_sync.errors import ManifestMismatch

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},  # which means nothing without an output head
    "qwen3": {"head_dim": 32, "tie_word_embeddings": True},
}
SHARED = [17, 40, 3, 99, 5, 5, 200, 31, 8]
SEQUENCES = [[7], [5, 9, 2], [*SHARED, 60, 61], [*SHARED, 90], list(range(20, 61)), [5, 9, 2]]
TOLERANCE = 1e-5
"""Float32 on both sides; sums are in another order."""


@cache
def reward_model(folder: Path) -> Any:
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    return model.eval().requires_grad_(False)


def expected(model: Any, sequences: Sequence[Sequence[int]] = SEQUENCES) -> list[list[float]]:
    return [model(torch.tensor([list(ids)])).logits[0].tolist() for ids in sequences]


def small_engine(folder: Path, **options: Any) -> Engine:
    """Steps of 16 tokens cut sequences into chunks, and the pool holds fewer tokens than all of them have."""
    options = {"skip_tokenizer_init": True, "chunked_prefill_size": 16, **options}
    return Engine(
        folder,
        block_size=4,
        kv_cache_bytes=pool_bytes(folder, num_blocks=16, block_size=4),
        **options,
    )


def changed(folder: Path) -> Any:
    """A model of the same shape with other weights, its head's included."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_transformers_before_and_after_a_sync(
    family: str, tiny_checkpoint: Callable[..., Path]
) -> None:
    folder = tiny_checkpoint(family, num_labels=1, **FAMILIES[family])
    with small_engine(folder) as engine:
        flat = [row[0] for row in expected(reward_model(folder))]
        assert engine.classify(input_ids=SEQUENCES) == pytest.approx(flat, abs=TOLERANCE)
        model = changed(folder)
        report = WeightPublisher(engine).publish(model)
        assert engine.weights_fingerprint() == fingerprint(model)
        flat = [row[0] for row in expected(model)]
        scores = engine.classify(input_ids=SEQUENCES, min_weight_version=report.version)
        assert scores == pytest.approx(flat, abs=TOLERANCE)


def test_two_ranks_score_as_one(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint("qwen3", num_labels=3, head_dim=32)
    with small_engine(folder, executor="local", tp_size=2, num_threads=1) as engine:
        for model in (reward_model(folder), changed(folder)):
            WeightPublisher(engine).publish(model)
            torch.testing.assert_close(
                torch.tensor(engine.classify(input_ids=SEQUENCES)),
                torch.tensor(expected(model)),
                atol=TOLERANCE,
                rtol=0,
            )
        assert engine.get_weights_by_name("score.weight") == model.score.weight.tolist()


def test_a_pool_and_a_client_of_it_score_alike(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint("llama", num_labels=1)
    flat = [row[0] for row in expected(reward_model(folder))]
    options = {"skip_tokenizer_init": True, "kv_cache_bytes": 4 << 20, "num_threads": 1}
    with RolloutPool(folder, num_replicas=2, **options) as pool:
        assert pool.classify(input_ids=SEQUENCES) == pytest.approx(flat, abs=TOLERANCE)
        with Engine.connect(pool.address) as client:
            scores = asyncio.run(client.async_classify(input_ids=SEQUENCES))
            assert scores == pytest.approx(flat, abs=TOLERANCE)


def test_text_is_scored_with_the_tokenizers_special_tokens(
    tiny_checkpoint: Callable[..., Path],
) -> None:
    folder = tiny_checkpoint("llama", num_labels=1)
    texts = ["the other", "no"]
    ids = AutoTokenizer.from_pretrained(folder)(texts)["input_ids"]
    with small_engine(folder, skip_tokenizer_init=False) as engine:
        flat = [row[0] for row in expected(reward_model(folder), ids)]
        assert engine.classify(texts) == pytest.approx(flat, abs=TOLERANCE)
        assert engine.classify("no") == pytest.approx(flat[1:], abs=TOLERANCE)
        assert engine.classify([]) == []


def test_a_padded_batch_needs_its_mask(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint("llama", num_labels=1)
    padded = torch.tensor([[5, 9, 2], [7, 256, 256]])
    with small_engine(folder) as engine:
        with pytest.raises(InvalidRequestError, match="padding token 256"):
            engine.classify(input_ids=padded)
        flat = [row[0] for row in expected(reward_model(folder), [[5, 9, 2], [7]])]
        scores = engine.classify(input_ids=padded, attention_mask=padded != 256)
        assert scores == pytest.approx(flat, abs=TOLERANCE)


def test_a_model_in_memory_becomes_a_scoring_engine(tiny_checkpoint: Callable[..., Path]) -> None:
    model = changed(tiny_checkpoint("qwen2", num_labels=1, tie_word_embeddings=True))
    model.config.architectures = ["Qwen2ForCausalLM"]  # what it was made from
    with Engine.from_model(model, kv_cache_bytes=4 << 20) as engine:
        flat = [row[0] for row in expected(model)]
        assert engine.classify(input_ids=SEQUENCES) == pytest.approx(flat, abs=TOLERANCE)
        assert model.config.architectures == ["Qwen2ForCausalLM"]


def test_each_kind_of_checkpoint_refuses_the_other_kinds_calls(
    tiny_checkpoint: Callable[..., Path],
) -> None:
    with small_engine(tiny_checkpoint("llama", num_labels=1)) as engine:
        with pytest.raises(InvalidRequestError, match="call classify"):
            engine.generate(input_ids=[5, 9])
        with pytest.raises(InvalidRequestError, match="call classify"):
            engine.sequence_logprobs([[5, 9]])
        assert engine.get_model_info()["is_generation"] is False
    with small_engine(tiny_checkpoint("llama")) as engine:
        with pytest.raises(InvalidRequestError, match="call generate, score or sequence_logprobs"):
            engine.classify(input_ids=[5, 9])
        assert engine.get_model_info()["is_generation"] is True


def test_a_policys_weights_are_no_reward_models(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint("llama", num_labels=1)
    with small_engine(folder) as engine:
        with pytest.raises(ManifestMismatch, match="num_labels"):
            engine.update_weights_from_disk(tiny_checkpoint("llama"))
        flat = [row[0] for row in expected(reward_model(folder))]
        assert engine.classify(input_ids=SEQUENCES) == pytest.approx(flat, abs=TOLERANCE)
