"""`encode`: the hidden state of the last token is that of transformers, wherever the engine runs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from versions import TOLERANCE, pool_bytes

from rollout import Engine, RolloutPool
from rollout.errors import DeadlineExceeded, InvalidRequestError
from weight_sync import WeightPublisher

SHARED = [17, 40, 3, 99, 5, 5, 200, 31, 8]
SEQUENCES = [[7], [5, 9, 2], [*SHARED, 60, 61], [*SHARED, 90], list(range(20, 61)), [5, 9, 2]]
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {},
    "qwen3": {"head_dim": 32, "tie_word_embeddings": True},
}


def expected(model: Any, sequences: Sequence[Sequence[int]] = SEQUENCES) -> list[list[float]]:
    """What transformers has for the last token after the last norm."""
    return [model.model(torch.tensor([ids])).last_hidden_state[0, -1].tolist() for ids in sequences]


def check(results: Sequence[dict[str, Any]], rows: Sequence[Sequence[float]]) -> None:
    assert len(results) == len(rows)
    for result, row in zip(results, rows, strict=True):
        assert result["embedding"] == pytest.approx(row, abs=TOLERANCE)


def small_engine(folder: Path, **options: Any) -> Engine:
    """Steps of 16 tokens cut sequences into chunks, and the pool holds fewer tokens than all of them have."""
    options = {"chunked_prefill_size": 16, "block_size": 4, **options}
    return Engine(folder, kv_cache_bytes=pool_bytes(folder, num_blocks=16, block_size=4), **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_tokens_state_is_that_of_transformers_before_and_after_a_sync(
    family: str, tiny_checkpoint: Callable[..., Path]
) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny_checkpoint(family, **FAMILIES[family])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with small_engine(folder) as engine, torch.no_grad():
        check(engine.encode(input_ids=SEQUENCES), expected(model))
        for parameter in model.parameters():
            parameter.mul_(1.05)
        report = WeightPublisher(engine).publish(model)
        results = engine.encode(input_ids=SEQUENCES, min_weight_version=report.version)
        check(results, expected(model))
        assert results[0]["meta_info"]["weight_version_number"] == report.version


@pytest.fixture(scope="module")
def folder(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("qwen3", head_dim=32)


@pytest.fixture(scope="module", params=["inline", "two ranks", "pool", "connect"])
def engine(request: pytest.FixtureRequest, folder: Path) -> Iterator[Engine]:
    with ExitStack() as stack:
        if request.param == "pool":
            options: dict[str, Any] = {"num_replicas": 2, "num_threads": 1}
            pool = RolloutPool(folder, kv_cache_bytes=1 << 20, **options)
            yield stack.enter_context(pool)
        elif request.param == "two ranks":
            yield stack.enter_context(
                small_engine(folder, executor="local", tp_size=2, num_threads=1)
            )
        elif request.param == "connect":
            there = stack.enter_context(small_engine(folder, executor="local", num_threads=1))
            yield stack.enter_context(Engine.connect(there.address))
        else:
            yield stack.enter_context(small_engine(folder, overlap=True))


def test_every_surface_encodes_alike(
    engine: Engine, folder: Path, reference_model: Callable[[Path], Any]
) -> None:
    rows = expected(reference_model(folder))
    check(engine.encode(input_ids=SEQUENCES), rows)
    check(asyncio.run(engine.async_encode(input_ids=SEQUENCES)), rows)
    engine.generate(input_ids=SEQUENCES[4], sampling_params={"max_new_tokens": 4})
    result = engine.encode(input_ids=SEQUENCES[4], rid="fifth")
    check([result], rows[4:5])
    meta = result["meta_info"]
    assert (meta["id"], meta["prompt_tokens"], meta["completion_tokens"]) == ("fifth", 41, 0)
    assert meta["finish_reason"] == {"type": "length", "length": 0}


def test_a_prompt_is_one_result_and_a_list_is_a_list(
    engine: Engine, folder: Path, reference_model: Callable[[Path], Any]
) -> None:
    ids = engine.tokenizer.encode("the cat")
    [row] = expected(reference_model(folder), [ids])
    result = engine.encode("the cat")
    assert result.keys() == {"embedding", "meta_info"}
    check([result, *engine.encode(["the cat"])], [row, row])
    assert engine.encode([]) == asyncio.run(engine.async_encode([])) == []


def test_what_cannot_be_encoded_is_refused_in_one_line(engine: Engine) -> None:
    for arguments, message in (
        ({"prompt": "a", "image_data": "x.png"}, "images are not supported"),
        (
            {"prompt": "a", "dimensions": 8},
            "encode: got an unknown argument dimensions=8; known are",
        ),
        ({"prompt": "a", "inputs_ids": 8}, "did you mean 'input_ids'"),
        ({"prompt": "a", "lora_path": "x"}, "LoRA adapters are not supported"),
        ({"input_ids": [[1] * 600]}, "expected fewer than the context length 512"),
    ):
        with pytest.raises(InvalidRequestError, match=message) as raised:
            engine.encode(**arguments)
        assert "\n" not in str(raised.value)


def test_a_deadline_ends_an_encode_that_waits(engine: Engine) -> None:
    engine.pause_generation("in_place")
    try:
        with pytest.raises(DeadlineExceeded, match=r"encode: not all was computed.*paused"):
            engine.encode(input_ids=[5, 9], timeout_s=0.2)
    finally:
        engine.continue_generation()


def test_a_classifier_encodes_too(tiny_checkpoint: Callable[..., Path]) -> None:
    from transformers import AutoModelForSequenceClassification

    folder = tiny_checkpoint("qwen3", num_labels=1, head_dim=32)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    with small_engine(folder) as engine, torch.no_grad():
        check(engine.encode(input_ids=SEQUENCES), expected(model))
