"""The log-probability rule against float64, and the search for the largest elements of a row."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.layers import logprobs as rule
from rollout.layers.selection import argmax, chunk_maxima, chunk_sums, largest

SIZES = [1, 2, 63, 64, 65, 127, 288, 1000, 5003]


def make_logits(num_rows: int, vocab: int, seed: int = 0, spread: float = 4.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, vocab, generator=generator) * spread


def exact(logits: torch.Tensor, temperature: torch.Tensor | float) -> torch.Tensor:
    if isinstance(temperature, torch.Tensor):
        temperature = temperature.double().unsqueeze(1)
    return torch.log_softmax(logits.double() / temperature, -1)


@pytest.mark.parametrize("vocab", SIZES)
@pytest.mark.parametrize("temperature", [1.0, 0.3, "rows"])
def test_token_logprobs_are_a_log_softmax(vocab: int, temperature: float | str) -> None:
    logits = make_logits(9, vocab)
    before = logits.clone()
    given = torch.linspace(0.2, 2.0, 9) if temperature == "rows" else float(temperature)
    targets = torch.randint(0, vocab, (9, 3), generator=torch.Generator().manual_seed(1))
    got = rule.token_logprobs(logits, given, targets)
    torch.testing.assert_close(
        got.double(), exact(logits, given).gather(1, targets), atol=4e-6, rtol=1e-6
    )
    assert torch.equal(rule.token_logprobs(logits, given, targets[:, 0]), got[:, 0])
    assert got.dtype == torch.float32 and torch.equal(logits, before)


def test_very_unlikely_tokens_have_exact_logprobs() -> None:
    logits = torch.tensor([[0.0, -60.0, -80.0, -150.0, -1e4, float("-inf")]])
    got = rule.token_logprobs(logits, 0.5, torch.arange(6).unsqueeze(0))
    want = torch.tensor([[0.0, -120.0, -160.0, -300.0, -2e4, float("-inf")]])
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_a_large_vocabulary_costs_no_precision() -> None:
    logits = make_logits(4, 150_000)
    targets = torch.randint(0, 150_000, (4, 50), generator=torch.Generator().manual_seed(1))
    got = rule.token_logprobs(logits, 1.0, targets)
    # A plain float32 sum over the row is off by several times as much.
    torch.testing.assert_close(
        got.double(), exact(logits, 1.0).gather(1, targets), atol=2.5e-6, rtol=0.0
    )


def test_logits_of_half_precision_are_taken_in_float32() -> None:
    logits = make_logits(3, 500).bfloat16()
    targets = torch.tensor([0, 1, 499])
    got = rule.token_logprobs(logits, 1.0, targets)
    want = exact(logits, 1.0).gather(1, targets.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(got.double(), want, atol=2e-6, rtol=1e-6)


def test_a_row_has_the_same_logprobs_in_any_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = make_logits(12, 1000)
    targets = torch.randint(0, 1000, (12, 2), generator=torch.Generator().manual_seed(2))
    temperature = torch.linspace(0.5, 1.5, 12)
    together = rule.token_logprobs(logits, temperature, targets)
    monkeypatch.setattr(rule, "BLOCK_BYTES", 5 * 4 * 1000)
    assert torch.equal(rule.token_logprobs(logits, temperature, targets), together)
    for row in range(12):
        alone = rule.token_logprobs(logits[row : row + 1], temperature[row], targets[row : row + 1])
        assert torch.equal(alone[0], together[row])


def test_no_rows_are_no_error() -> None:
    none = torch.empty(0, 288)
    assert rule.token_logprobs(none, 1.0, torch.empty(0, dtype=torch.int64)).shape == (0,)
    assert rule.top_logprobs(none, torch.empty(0), 3)[0].shape == (0, 3)


@pytest.mark.parametrize("vocab", SIZES)
@pytest.mark.parametrize("k", [1, 5, 20, 300])
def test_top_logprobs_are_the_largest_in_order(vocab: int, k: int) -> None:
    logits = make_logits(7, vocab)
    values, ids = rule.top_logprobs(logits, 0.7, k)
    want_values, want_ids = exact(logits, 0.7).topk(min(k, vocab))
    assert torch.equal(ids, want_ids)
    torch.testing.assert_close(values.double(), want_values, atol=4e-6, rtol=1e-6)


def test_probabilities_of_chosen_rows_only_are_computed_in_their_order() -> None:
    logits = make_logits(10, 300)
    rows = torch.tensor([7, 2, 2, 9])
    temperature = torch.tensor([1.0, 0.5, 2.0, 1.5])
    blocks = list(rule.probability_blocks(logits, temperature, rows))
    assert len(blocks) == 1 and blocks[0].rows == slice(0, 4)
    want = torch.softmax(logits[rows] / temperature.unsqueeze(1), -1)
    torch.testing.assert_close(blocks[0].values, want)
    torch.testing.assert_close(blocks[0].total, torch.ones(4, dtype=torch.float64))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    num_rows=st.integers(1, 5),
    vocab=st.one_of(st.integers(1, 400), st.integers(400, 9000)),
    k=st.integers(1, 200),
    levels=st.integers(1, 1000),
    seed=st.integers(0, 2**31),
)
def test_selection_over_chunks_is_exact_even_with_ties(
    num_rows: int, vocab: int, k: int, levels: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, levels, (num_rows, vocab), generator=generator).float()
    found, columns = largest(values, k)
    assert torch.equal(found, values.topk(min(k, vocab)).values)
    assert torch.equal(values.gather(1, columns), found)
    assert all(len(set(row)) == len(row) for row in columns.tolist())
    assert torch.equal(argmax(values), values.argmax(-1))
    size = 64
    padded = -(-vocab // size) * size
    sums = torch.zeros(num_rows, padded)
    sums[:, :vocab] = values
    assert torch.equal(chunk_sums(values, size), sums.view(num_rows, -1, size).sum(-1))
    assert torch.equal(chunk_maxima(values, size), sums.view(num_rows, -1, size).amax(-1))


def test_the_last_column_of_a_short_chunk_is_found_once() -> None:
    values = torch.rand(2, 64 * 40 + 3, generator=torch.Generator().manual_seed(0))
    values[:, -1] = 2.0
    found, columns = largest(values, 5)
    assert columns[:, 0].tolist() == [64 * 40 + 2] * 2
    assert torch.equal(found, values.topk(5).values)


@pytest.mark.parametrize("vocab", [10, 300, 5000])
def test_argmax_takes_the_first_of_equals_and_shows_a_nan(vocab: int) -> None:
    flat = torch.zeros(2, vocab)
    assert argmax(flat).tolist() == [0, 0]
    flat[1, vocab - 1] = float("nan")
    flat[0, 5:] = 1.0
    assert argmax(flat).tolist() == [5, vocab - 1]
