"""The sampler against exact probabilities and a plain reference of filters and penalties."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from rollout.errors import NonFiniteLogitsError
from rollout.layers import logprobs as rule
from rollout.layers.draw import uniforms
from rollout.layers.sampler import Sampler
from rollout.sampling_params import SamplingParams, mix64
from rollout.scheduling import Request


def make_request(
    *,
    seed: int = 0,
    prompt: list[int] | None = None,
    output: list[int] | None = None,
    logprob: bool = True,
    stop_ids: tuple[int, ...] = (),
    **params: Any,
) -> Request:
    request = Request(
        rid=f"r{seed}",
        prompt_ids=[0] if prompt is None else prompt,
        params=SamplingParams(**params),
        seed=seed,
        return_logprob=logprob,
        stop_ids=stop_ids,
    )
    request.token_ids += output or []
    return request


def make_logits(num_rows: int, vocab: int, seed: int = 0, spread: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, vocab, generator=generator) * spread


def reference_weights(
    logits: torch.Tensor, params: SamplingParams, prompt: list[int], output: list[int]
) -> np.ndarray:
    """Exact probabilities of the next token, the slow and obvious way."""
    z = logits.double().numpy().copy()
    for token in set(prompt) | set(output):
        z[token] = (
            z[token] / params.repetition_penalty
            if z[token] > 0
            else z[token] * params.repetition_penalty
        )
    for token in set(output):
        z[token] -= params.frequency_penalty * output.count(token) + params.presence_penalty
    for token, bias in (params.logit_bias or {}).items():
        z[token] += bias
    z /= params.temperature
    p = np.exp(z - z.max())
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    keep = len(p) if params.top_k < 1 else min(params.top_k, len(p))
    order = order[:keep]
    kept = p[order] / p[order].sum()
    before = np.cumsum(kept) - kept
    order = order[before < params.top_p]
    order = order[p[order] >= params.min_p * p.max()]
    weights = np.zeros_like(p)
    weights[order] = p[order] / p[order].sum()
    return weights


def histogram(logits: torch.Tensor, num_draws: int, **params: Any) -> np.ndarray:
    """Counts of tokens drawn from one row by many requests and positions."""
    width = min(num_draws, 1000)
    prompt, output = params.pop("prompt", [0]), params.pop("output", [])
    sampler, rows, all_params = Sampler(), logits.expand(width, -1), SamplingParams(**params)
    counts = np.zeros(logits.shape[-1], np.int64)
    for start in range(0, num_draws, width):
        requests = []
        for seed in range(start, start + width):
            request = Request(rid="r", prompt_ids=prompt, params=all_params, seed=seed)
            request.token_ids += output
            requests.append(request)
        counts += np.bincount(sampler.sample(rows, requests).token_ids, minlength=len(counts))
    return counts


def assert_fits(counts: np.ndarray, probabilities: np.ndarray) -> None:
    """Chi-square: five standard deviations above its mean is a chance of less than one in a million."""
    assert counts[probabilities == 0].sum() == 0
    expected = probabilities * counts.sum()
    large = expected >= 5
    observed = np.append(counts[large], counts[~large].sum())
    expected = np.append(expected[large], expected[~large].sum())
    used = expected > 0
    statistic = ((observed[used] - expected[used]) ** 2 / expected[used]).sum()
    freedom = used.sum() - 1
    assert statistic < freedom + 5 * math.sqrt(2 * freedom) + 5, (statistic, freedom)


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.4},
        {"temperature": 2.5},
        {"top_k": 7},
        {"top_p": 0.6},
        {"min_p": 0.05},
        {"temperature": 1.3, "top_k": 40, "top_p": 0.8, "min_p": 0.02},
        {"repetition_penalty": 1.4, "frequency_penalty": 0.7, "presence_penalty": -0.4},
        {"logit_bias": {3: 4.0, 5: -3.0}, "top_k": 12},
    ],
    ids=str,
)
def test_draws_follow_the_exact_distribution(params: dict[str, Any]) -> None:
    logits = make_logits(1, 500, seed=4, spread=2.0)
    prompt, output = [1, 2, 3], [3, 4, 4, 9]
    want = reference_weights(logits[0], SamplingParams(**params), prompt, output)
    counts = histogram(logits, 10_000, prompt=prompt, output=output, **params)
    assert_fits(counts, want)


def test_draws_of_one_request_at_many_positions_are_independent_enough() -> None:
    seeds = np.full(20_000, 12345, np.uint64)
    numbers = uniforms(seeds, np.arange(20_000))
    assert_fits(np.histogram(numbers, 100, (0, 1))[0], np.full(100, 0.01))
    pairs = np.histogram2d(numbers[:-1], numbers[1:], 10, ((0, 1), (0, 1)))[0]
    assert_fits(pairs.ravel(), np.full(100, 0.01))
    neighbours = uniforms(np.arange(20_000).astype(np.uint64), np.zeros(20_000, np.int64))
    assert_fits(np.histogram(neighbours, 100, (0, 1))[0], np.full(100, 0.01))


def test_uniforms_are_the_documented_hash() -> None:
    got = uniforms(np.array([2**64 - 1, 7], np.uint64), np.array([0, 5]))
    want = [mix64((mix64(s) + p) % 2**64) >> 11 for s, p in ((2**64 - 1, 0), (7, 5))]
    assert got.tolist() == [number / 2**53 for number in want]


@pytest.mark.parametrize("vocab", [3, 64, 288, 1000, 8192])
def test_a_row_draws_the_same_whatever_the_batch(
    vocab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 0.0},
        {"temperature": 0.6, "top_p": 0.9},
        {"top_k": 2},
        {"top_k": 200, "top_p": 0.99},
        {"repetition_penalty": 1.2},
        {"min_p": 0.1, "presence_penalty": 1.0},
        {"min_new_tokens": 9},
    ]
    logits = make_logits(24, vocab)

    def requests() -> list[Request]:
        return [
            make_request(seed=i, output=[i % vocab] * (i % 3), stop_ids=(1,), **kinds[i % 8])
            for i in range(24)
        ]

    together = Sampler().sample(logits, requests())
    assert together.logprobs is not None
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = Sampler().sample(logits[order], [requests()[i] for i in order])
    assert shuffled.token_ids == [together.token_ids[i] for i in order]
    assert shuffled.logprobs is not None and torch.equal(
        shuffled.logprobs, together.logprobs[order]
    )
    for i, request in enumerate(requests()):
        alone = Sampler().sample(logits[i : i + 1], [request])
        assert alone.token_ids == [together.token_ids[i]]
        assert alone.logprobs is not None and alone.logprobs[0] == together.logprobs[i]
    monkeypatch.setattr(rule, "BLOCK_BYTES", 4 * 4 * vocab)
    assert Sampler().sample(logits, requests()).token_ids == together.token_ids


def test_logprobs_are_those_of_the_raw_logits_at_the_request_temperature() -> None:
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.7},
        {"temperature": 0.0},
        {"temperature": 0.0, "repetition_penalty": 1.5},
        {"temperature": 0.5, "top_k": 1},
        {"temperature": 1.7, "top_k": 3, "top_p": 0.5},
        {"frequency_penalty": 2.0, "temperature": 0.9},
        {"logit_bias": {17: 100.0}},
        {"min_new_tokens": 4},
    ]
    logits = make_logits(8, 400)
    requests = [
        make_request(seed=i, output=[5, 6], stop_ids=(2,), **kind) for i, kind in enumerate(kinds)
    ]
    out = Sampler().sample(logits, requests)
    temperature = torch.tensor([0.7, 1.0, 1.0, 0.5, 1.7, 0.9, 1.0, 1.0]).double().unsqueeze(1)
    want = torch.log_softmax(logits.double() / temperature, -1)
    want = want.gather(1, torch.tensor(out.token_ids).unsqueeze(1)).squeeze(1)
    assert out.logprobs is not None and out.logprobs.dtype == torch.float32
    torch.testing.assert_close(out.logprobs.double(), want, atol=4e-6, rtol=1e-6)
    assert out.token_ids[6] == 17
    targets = torch.tensor(out.token_ids)
    same_rule = rule.token_logprobs(logits, temperature.float().squeeze(1), targets)
    assert torch.equal(same_rule, out.logprobs)


def test_greedy_takes_the_largest_raw_or_edited_logit() -> None:
    logits = make_logits(4, 5000)
    greedy = [make_request(seed=i, temperature=0.0, logprob=False) for i in range(4)]
    out = Sampler().sample(logits, greedy)
    assert out.token_ids == logits.argmax(-1).tolist() and out.logprobs is None
    top = out.token_ids[0]
    biased = make_request(temperature=0.0, logit_bias={top: -100.0})
    want = logits[0].clone()
    want[top] -= 100
    assert Sampler().sample(logits[:1], [biased]).token_ids == [int(want.argmax())]


def test_tokens_that_end_a_request_are_not_drawn_before_its_minimum() -> None:
    logits = torch.full((1, 10), -20.0)
    logits[0, 3] = logits[0, 4] = 20.0
    logits[0, 8] = 5.0
    sampler = Sampler()
    request = make_request(min_new_tokens=2, stop_ids=(3, 4))
    for want in ({8}, {8}, {3, 4}):
        token = sampler.sample(logits, [request]).token_ids[0]
        assert token in want
        request.token_ids.append(token)


def test_samples_of_one_prompt_share_a_row_of_logits() -> None:
    logits = make_logits(2, 300)
    requests = [make_request(seed=i) for i in range(6)]
    rows = [1, 1, 0, 1, 0, 0]
    shared = Sampler().sample(logits, requests, rows)
    assert shared.token_ids == Sampler().sample(logits[rows], requests).token_ids
    assert len(set(shared.token_ids)) > 2


def test_penalty_state_follows_an_output_that_grows_and_is_taken_back() -> None:
    params = {"repetition_penalty": 1.8, "frequency_penalty": 1.5, "temperature": 0.8}
    logits = make_logits(1, 60, spread=1.0)
    request, sampler = make_request(seed=5, prompt=[1, 2], **params), Sampler()
    for step in range(150):
        fresh = make_request(seed=5, prompt=[1, 2], output=request.output_ids, **params)
        token = sampler.sample(logits, [request]).token_ids[0]
        assert Sampler().sample(logits, [fresh]).token_ids[0] == token
        request.token_ids.append(token)
        if step % 40 == 39:
            del request.token_ids[-25:]


def test_rows_that_are_no_distribution_are_named() -> None:
    logits = make_logits(8, 300)
    logits[1, 7] = float("nan")
    logits[3, 9] = float("inf")
    logits[4] = float("-inf")
    logits[6, 5] = float("nan")
    logits[7, :299] = float("-inf")
    requests = [make_request(seed=i) for i in range(8)]
    requests[3] = make_request(seed=3, temperature=0.0, logprob=False)
    requests[6] = make_request(seed=6, presence_penalty=1.0)
    with pytest.raises(NonFiniteLogitsError, match=r"1 \(r1\), 3 \(r3\).* expected") as caught:
        Sampler().sample(logits, requests)
    assert caught.value.rows == (1, 3, 4, 6)
    good = [0, 2, 5, 7]
    assert Sampler().sample(logits[good], [requests[i] for i in good]).token_ids[3] == 299


def test_the_logits_are_left_as_they_were() -> None:
    logits = make_logits(4, 300)
    before = logits.clone()
    kinds: list[dict[str, Any]] = [{}, {"top_k": 3}, {"repetition_penalty": 2.0}, {"top_p": 0.3}]
    Sampler().sample(logits, [make_request(seed=i, **kind) for i, kind in enumerate(kinds)])
    assert torch.equal(logits, before)


def test_a_mixed_batch_reports_logprobs_only_to_those_who_ask() -> None:
    logits = make_logits(3, 300)
    requests = [
        make_request(seed=0, logprob=False, temperature=0.0),
        make_request(seed=1, logprob=True, temperature=0.0),
        make_request(seed=2, logprob=True, presence_penalty=0.5),
    ]
    out = Sampler().sample(logits, requests)
    assert out.logprobs is not None and out.logprobs.isnan().tolist() == [True, False, False]


def test_other_companions_of_the_same_first_request_are_noticed() -> None:
    logits, sampler = make_logits(2, 300, spread=0.1), Sampler()
    first, second = make_request(seed=1), make_request(seed=2)
    sampler.sample(logits, [first, second])
    greedy = make_request(seed=3, temperature=0.0)
    assert sampler.sample(logits, [first, greedy]).token_ids[1] == int(logits[1].argmax())


@pytest.mark.parametrize("filters", [{"top_k": 3}, {"top_p": 0.3}, {"min_p": 1.0}], ids=str)
def test_tokens_as_likely_as_the_last_that_is_kept_are_kept(filters: dict[str, Any]) -> None:
    flat = torch.zeros(1, 40)
    assert (histogram(flat, 4000, **filters) > 0).all()
