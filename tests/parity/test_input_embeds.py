"""Prompts that are rows of numbers in place of tokens: what the engine says of them is what transformers says.

As in the other tests of parity, steps of 16 tokens cut prompts, the pool holds fewer tokens than the requests need, and
everything happens once more after an update.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from deterministic_support import folder_of, make_model
from interpreted import Checks
from versions import TOLERANCE, pool_bytes, version_weights

from rollout import Engine
from rollout.errors import InvalidRequestError
from rollout.protocol.embeds import identity_of, places_of, read_embeds
from weight_sync import WeightPublisher

GREEDY = {"temperature": 0.0, "max_new_tokens": 20, "ignore_eos": True}
LENGTHS = (41, 1, 23, 9, 33)
LAYOUTS: dict[str, dict[str, Any]] = {
    "one-rank": {"executor": "inline"},
    "one-rank-ahead": {"executor": "inline", "overlap": True},
    "two-ranks-apart": {"executor": "local", "tp_size": 2, "overlap": True, "num_threads": 1},
}
CHECKS = Checks()


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    engine: Engine
    model: Any
    folder: Path


@pytest.fixture(scope="module", params=LAYOUTS)
def setup(request: pytest.FixtureRequest, tiny_checkpoint: Callable[..., Path]) -> Iterator[Setup]:
    from transformers import AutoModelForCausalLM

    folder = tiny_checkpoint("qwen2", vocab_size=289)
    options = LAYOUTS[request.param]
    size = pool_bytes(folder, num_blocks=36, block_size=4, tp_size=options.get("tp_size", 1))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with Engine(
        folder,
        skip_tokenizer_init=True,
        block_size=4,
        chunked_prefill_size=16,
        kv_cache_bytes=size,
        **options,
    ) as engine:
        yield Setup(engine=engine, model=model.eval().requires_grad_(False), folder=folder)


def soft_prompts(seed: int) -> list[torch.Tensor]:
    """Rows that are no token's."""
    generator = torch.Generator().manual_seed(seed)
    return [0.3 * torch.randn(length, 64, generator=generator) for length in LENGTHS]


def expected_logits(model: Any, rows: torch.Tensor, output_ids: list[int]) -> torch.Tensor:
    """Those from which transformers draws each output token."""
    embedded = model.get_input_embeddings()(torch.tensor(output_ids, device=model.device))
    with torch.no_grad():
        rows = rows.to(model.device, model.dtype)
        logits = model(inputs_embeds=torch.cat([rows, embedded])[None]).logits[0]
    return logits[len(rows) - 1 : -1].float()


def check(model: Any, rows: torch.Tensor, result: dict[str, Any]) -> None:
    """Greedy tokens, their log-probabilities, and spans over all of them."""
    ids, meta = result["output_ids"], result["meta_info"]
    values = torch.log_softmax(expected_logits(model, rows, ids), -1)
    assert values.argmax(-1).tolist() == ids
    got = [value for value, _, _ in meta["output_token_logprobs"]]
    assert got == pytest.approx(values.max(-1).values.tolist(), abs=TOLERANCE)
    assert meta["prompt_tokens"] == len(rows)
    assert meta["weight_versions"][-1]["end"] == meta["completion_tokens"] == len(ids)


def generate(setup: Setup, embeds: Any, **sampling: Any) -> Any:
    params = {**GREEDY, **sampling}
    return setup.engine.generate(input_embeds=embeds, sampling_params=params, return_logprob=True)


def test_greedy_outputs_are_those_of_transformers_with_retractions_and_beside_prompts_of_tokens(
    setup: Setup,
) -> None:
    prompts = soft_prompts(0)
    tokens = [list(range(40, 70)), [3, 4]]
    with ThreadPoolExecutor() as pool:
        beside = pool.submit(setup.engine.generate, input_ids=tokens, sampling_params=GREEDY)
        results = generate(setup, prompts)
    for rows, result in zip(prompts, results, strict=True):
        check(setup.model, rows, result)
    assert sum(result["meta_info"]["num_retractions"] for result in results) > 0
    embedding = setup.model.get_input_embeddings()
    for ids, result in zip(tokens, beside.result(), strict=True):
        same = generate(setup, embedding(torch.tensor(ids)))
        assert same["output_ids"] == result["output_ids"]


def test_cached_prefixes_are_those_of_the_same_rows_alone(setup: Setup) -> None:
    first, second = soft_prompts(1)[0], soft_prompts(2)[0]
    check(setup.model, first, generate(setup, first))
    again = generate(setup, first)
    assert again["meta_info"]["cached_tokens"] == 40
    check(setup.model, first, again)
    nearly = first.clone()
    nearly[-1] += 0.5
    for rows in (second, nearly):
        result = generate(setup, rows)
        assert result["meta_info"]["cached_tokens"] == 0
        check(setup.model, rows, result)
    salted = setup.engine.generate(
        input_embeds=first, sampling_params=GREEDY, return_logprob=True, cache_salt="other"
    )
    assert salted["meta_info"]["cached_tokens"] == 0


def test_no_salt_of_a_prompt_of_tokens_leads_to_what_is_cached_of_rows(setup: Setup) -> None:
    rows = soft_prompts(6)[0]
    generate(setup, rows)
    embeds = read_embeds(rows)[0][0]
    digest = hashlib.sha256(embeds.data)
    digest.update(f" {embeds.dtype} {embeds.shape} ".encode())
    for salt in (identity_of(embeds), f"embeds {digest.hexdigest()}"):
        ids = places_of(embeds)
        found = setup.engine.generate(input_ids=ids, sampling_params=GREEDY, cache_salt=salt)
        assert found["meta_info"]["cached_tokens"] == 0
    check(setup.model, rows, generate(setup, rows))


def test_samples_of_one_prompt_and_prompts_that_are_the_same_compute_it_once(setup: Setup) -> None:
    rows = soft_prompts(3)[2]
    results = generate(setup, [rows, rows], n=2)
    assert len(results) == 4
    assert sorted(result["meta_info"]["cached_tokens"] for result in results) == [0, 23, 23, 23]
    for result in results:
        check(setup.model, rows, result)


def test_a_repetition_penalty_knows_the_output_alone(setup: Setup) -> None:
    rows = soft_prompts(4)[3]
    ids = generate(setup, rows, repetition_penalty=1.7, max_new_tokens=12)["output_ids"]
    logits = expected_logits(setup.model, rows, ids)
    for position in range(len(ids)):
        seen = sorted(set(ids[:position]))
        values = logits[position, seen]
        logits[position, seen] = torch.where(values > 0, values / 1.7, values * 1.7)
    assert logits.argmax(-1).tolist() == ids


def test_an_update_reaches_prompts_of_rows_too(setup: Setup) -> None:
    prompts = soft_prompts(5)
    generate(setup, prompts)
    for number in (1, 0):  # the other tests find the weights as they were
        tensors = version_weights(setup.folder, number)
        with WeightPublisher(setup.engine) as publisher:
            publisher.publish(tensors, label=f"v{number}")
        setup.model.load_state_dict(tensors, strict=False)
        for rows, result in zip(prompts, generate(setup, prompts), strict=True):
            check(setup.model, rows, result)
            assert result["meta_info"]["weight_version"] == f"v{number}"


@pytest.mark.parametrize("kind", ["lists", "arrays", "bfloat16", "three dimensions", "tuples"])
def test_rows_come_as_callers_have_them(setup: Setup, kind: str) -> None:
    rows = soft_prompts(6)[3].to(torch.bfloat16)
    plain = rows.float()
    given: Any = {
        "lists": plain.tolist(),
        "arrays": plain.numpy(),
        "bfloat16": rows,
        "three dimensions": plain[None],
        "tuples": tuple(plain),
    }[kind]
    result = generate(setup, given)
    check(setup.model, plain, result[0] if kind == "three dimensions" else result)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"input_embeds": torch.zeros(3, 8)}, "rows of 8 numbers, expected .* hidden size 64"),
        ({"input_embeds": torch.zeros(3)}, r"prompt 0: got shape \(3,\)"),
        ({"input_embeds": torch.zeros(0, 64)}, "at least one row"),
        ({"input_embeds": torch.zeros(2, 64, dtype=torch.int64)}, "int64 numbers"),
        ({"input_embeds": [[0.5] * 64, [0.5]]}, "prompt 0: got"),
        ({"input_embeds": "hello"}, "prompt 0: got str 'hello'"),
        ({"input_embeds": torch.zeros(2, 64, device="meta")}, "cannot be read"),
        ({"input_embeds": torch.zeros(2, 64).to_sparse()}, "cannot be read|shape"),
        ({"input_embeds": torch.full((2, 64), float("nan"))}, "not finite"),
        ({"input_embeds": torch.zeros(2, 64), "input_ids": [1]}, "input_ids beside it"),
        ({"input_embeds": torch.zeros(2, 64), "return_prompt_token_ids": True}, "has no tokens"),
        (
            {
                "input_embeds": torch.zeros(2, 64),
                "return_logprob": True,
                "logprob_start_len": 0,
            },
            "no log-probabilities of its own",
        ),
        ({"input_embeds": torch.zeros(600, 64)}, "got 600 tokens, expected fewer"),
    ],
)
def test_what_is_no_prompt_is_refused_in_a_line(
    setup: Setup, arguments: dict[str, Any], words: str
) -> None:
    with pytest.raises(InvalidRequestError, match=words) as refused:
        setup.engine.generate(**arguments)
    assert "\n" not in str(refused.value)


@CHECKS.add()
def fused_steps_read_rows(device: torch.device) -> None:
    """Chunks, a cached prefix, and decodes in a graph behind them."""
    model = make_model("qwen3", torch.float32).to(device).eval()
    rows = [0.3 * torch.randn(length, 64) for length in (19, 5)]
    sampling = {**GREEDY, "max_new_tokens": 4}
    with (
        folder_of(model) as folder,
        Engine(
            folder,
            device=str(device),
            attention_backend="triton",
            deterministic=True,
            skip_tokenizer_init=True,
            kv_cache_bytes=4 << 20,
            block_size=16,
            chunked_prefill_size=16,
            overlap=True,
        ) as engine,
    ):
        for _ in range(2):
            results = engine.generate(
                input_embeds=rows, sampling_params=sampling, return_logprob=True
            )
            for each, result in zip(rows, results, strict=True):
                check(model, each, result)
        assert results[0]["meta_info"]["cached_tokens"] == 16


if __name__ == "__main__":
    CHECKS.main()
else:
    verdicts, test_under_the_interpreter, test_on_the_gpu = CHECKS.as_tests(__file__)
