"""top-k, top-p and min-p against a plain reference, and the draw from what they leave."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.layers.draw import draw
from rollout.layers.logprobs import chunk_size
from rollout.layers.sampling_filters import lower_bounds
from rollout.layers.selection import chunk_sums
from rollout.sampling_params import SamplingParams

EVERYTHING = 1 << 40


def make_logits(num_rows: int, vocab: int, seed: int = 0, spread: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, vocab, generator=generator) * spread


def reference_kept(p: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Which tokens may be drawn, the slow and obvious way: sort, cut, renormalise, cut."""
    order = np.argsort(-p, kind="stable")
    if params.top_k > 0:
        order = order[: params.top_k]
    kept = p[order] / p[order].sum()
    order = order[np.cumsum(kept) - kept < params.top_p]
    order = order[p[order] >= params.min_p * p.max()]
    return np.isin(np.arange(len(p)), order)


def bounds_of(
    p: torch.Tensor, *, top_k: int = EVERYTHING, top_p: float = 1.0, min_p: float = 0.0
) -> torch.Tensor:
    rows = len(p)
    return lower_bounds(
        p,
        torch.tensor([top_k] * rows),
        torch.tensor([top_p] * rows, dtype=torch.float64),
        torch.tensor([min_p] * rows),
    )


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    vocab=st.sampled_from([2, 5, 64, 100, 700, 3000]),
    top_k=st.one_of(st.just(-1), st.integers(1, 800)),
    top_p=st.floats(0.01, 1.0),
    min_p=st.one_of(st.just(0.0), st.floats(0.0, 1.0)),
    spread=st.floats(0.05, 6.0),
    seed=st.integers(0, 2**31),
)
def test_filters_keep_what_the_plain_reference_keeps(
    vocab: int, top_k: int, top_p: float, min_p: float, spread: float, seed: int
) -> None:
    logits = make_logits(3, vocab, seed, spread)
    p = torch.softmax(logits, -1)
    k = torch.tensor([top_k if top_k > 0 else 1 << 40, 1 << 40, 5])
    bounds = lower_bounds(
        p, k, torch.tensor([top_p] * 3, dtype=torch.float64), torch.tensor([min_p] * 3)
    )
    for row in range(3):
        params = SamplingParams(top_k=(top_k, -1, 5)[row], top_p=top_p, min_p=min_p)
        want = reference_kept(p[row].double().numpy(), params)
        kept = (p[row] >= bounds[row]).numpy()
        # Rounding may move the border by the tokens whose probability is that of the border.
        border = np.isclose(p[row].numpy(), bounds[row].item(), rtol=1e-4)
        assert (kept == want)[~border].all()
        assert kept.any()


def test_a_nucleus_larger_than_the_first_guess_is_found() -> None:
    flat = make_logits(2, 20_000, spread=0.01)
    p = torch.softmax(flat, -1)
    everything = torch.tensor([1 << 40] * 2)
    bounds = lower_bounds(
        p, everything, torch.tensor([0.5, 0.9], dtype=torch.float64), torch.zeros(2)
    )
    kept = (p >= bounds.unsqueeze(1)).double()
    share = (kept * p).sum(-1)
    assert (share - torch.tensor([0.5, 0.9])).abs().max() < 1e-4


def test_top_k_alone_keeps_k_tokens_however_unlikely() -> None:
    p = torch.tensor([[1.0, 1e-9, 1e-12, 1e-20, 1e-25, 1e-30]])
    for k in range(1, 7):
        assert (p >= bounds_of(p, top_k=k).unsqueeze(1)).sum() == k


def test_rows_with_different_k_do_not_see_each_other() -> None:
    p = torch.softmax(make_logits(1, 400), -1).expand(3, -1).contiguous()
    half = torch.tensor([0.5] * 3, dtype=torch.float64)
    together = lower_bounds(p, torch.tensor([2, 300, EVERYTHING]), half, torch.zeros(3))
    for row, k in enumerate((2, 300, EVERYTHING)):
        assert bounds_of(p[:1], top_k=k, top_p=0.5)[0] == together[row]


@pytest.mark.parametrize("leading", [0, 300])
def test_a_draw_at_zero_skips_what_has_no_weight(leading: int) -> None:
    weights = torch.zeros(1, 1000)
    weights[0, leading] = weights[0, 900] = 1.0
    sums = chunk_sums(weights, chunk_size(1000))
    assert draw(weights, sums, torch.zeros(1, dtype=torch.float64)).item() == leading


@pytest.mark.parametrize("vocab", [1, 2, 63, 64, 300, 8192])
@pytest.mark.parametrize("uniform", [0.0, 0.25, 0.9999999, 1.0 - 2.0**-53])
def test_a_token_of_probability_zero_is_never_drawn(vocab: int, uniform: float) -> None:
    generator = torch.Generator().manual_seed(vocab)
    weights = torch.rand(200, vocab, generator=generator)
    weights[weights < 0.9] = 0.0
    weights[:, vocab // 2] = 1e-30
    columns = draw(
        weights,
        chunk_sums(weights, chunk_size(vocab)),
        torch.full((200,), uniform, dtype=torch.float64),
    )
    assert (weights.gather(1, columns.unsqueeze(1)) > 0).all()


def test_draws_are_the_inverse_of_the_cumulative_sum() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(500, 3001, generator=generator) ** 8
    uniform = torch.rand(500, generator=generator, dtype=torch.float64)
    columns = draw(weights, chunk_sums(weights, chunk_size(3001)), uniform)
    cumulative = weights.double().cumsum(-1)
    above = cumulative.gather(1, columns.unsqueeze(1)).squeeze(1) / cumulative[:, -1]
    below = above - weights.gather(1, columns.unsqueeze(1)).squeeze(1) / cumulative[:, -1]
    assert (below <= uniform + 1e-7).all() and (uniform <= above + 1e-7).all()
