"""The runner against transformers, in float32: log-probabilities within 1e-4 and the same greedy tokens."""

from __future__ import annotations

import copy
import random
from contextlib import nullcontext

import pytest
import torch

from rollout.layers.linear import project
from rollout.runner.forward_batch import GroupLimits

TOLERANCE = 1e-4
"""Of a log-probability. Sums in another order differ by about 2e-6 here; a wrong option by more than 1e-2."""


def random_tokens(seed, *lengths):
    rng = random.Random(seed)
    return [[rng.randrange(256) for _ in range(length)] for length in lengths]


def largest_gap(got, expected):
    return (got - expected).abs().max().item()


def test_whole_prompts_of_mixed_lengths_agree(variant_folder, hand_driver, reference_logprobs):
    driver = hand_driver(variant_folder)
    requests = [driver.request(ids) for ids in random_tokens(0, 1, 3, 40, 4, 5, 5, 12, 23)]
    driver.step([(request, request.num_tokens) for request in requests])
    for request in requests:
        expected = reference_logprobs(variant_folder, request.token_ids)
        assert largest_gap(driver.logprobs(request), expected) < TOLERANCE


def test_any_mixture_of_chunks_and_single_tokens_agrees(
    variant_folder, hand_driver, reference_logprobs
):
    driver = hand_driver(variant_folder)
    rng = random.Random(1)
    requests = [driver.request(ids) for ids in random_tokens(2, 2, 9, 16, 17, 33, 33, 48)]
    while unfinished := [r for r in requests if r.num_computed < r.num_tokens]:
        chosen = [r for r in unfinished if rng.random() < 0.7] or unfinished
        sizes = [rng.choice((1, 1, 2, 3, 7, 20)) for _ in chosen]
        driver.step(
            [
                (request, min(size, request.num_tokens - request.num_computed))
                for request, size in zip(chosen, sizes, strict=True)
            ]
        )
    for request in requests:
        expected = reference_logprobs(variant_folder, request.token_ids)
        assert largest_gap(driver.logprobs(request), expected) < TOLERANCE


def test_greedy_continuations_are_those_of_transformers(
    variant_folder, hand_driver, reference_model
):
    driver, reference = hand_driver(variant_folder), reference_model(variant_folder)
    requests = [driver.request(ids) for ids in random_tokens(3, 1, 6, 14, 25)]
    last_rows = [part[-1] for part in driver.step([(r, r.num_tokens) for r in requests])]
    for _ in range(15):
        for request, row in zip(requests, last_rows, strict=True):
            request.token_ids.append(int(row.argmax()))
            driver.own_blocks(request)
        last_rows = [part[-1] for part in driver.step([(r, 1) for r in requests])]
    for request in requests:
        expected = reference.generate(
            torch.tensor([request.token_ids[: request.num_prompt_tokens]]),
            max_new_tokens=15,
            do_sample=False,
            eos_token_id=None,
        )
        assert request.token_ids == expected[0].tolist()


@pytest.mark.parametrize("block_size", [1, 16, 64])
def test_the_block_size_does_not_matter(
    block_size, tiny_checkpoint, hand_driver, reference_logprobs
):
    folder = tiny_checkpoint("mistral", sliding_window=7)
    driver = hand_driver(folder, block_size=block_size)
    requests = [driver.request(ids) for ids in random_tokens(4, 30, 5, 31)]
    for sizes in ((11, 5, 30), (1, None, 1), (18, None, None)):
        driver.step([(r, size) for r, size in zip(requests, sizes, strict=True) if size])
    for request in requests:
        expected = reference_logprobs(folder, request.token_ids)
        assert largest_gap(driver.logprobs(request), expected) < TOLERANCE


@pytest.mark.parametrize("limit", [1, 5])
def test_the_grouping_does_not_matter(limit, variant_folder, hand_driver, reference_logprobs):
    driver = hand_driver(variant_folder)
    driver.runner.backend.limits = GroupLimits(
        max_blocks=limit * 4, max_padding_blocks=limit, max_queries=limit * 8
    )
    requests = [driver.request(ids) for ids in random_tokens(10, 3, 4, 4, 9, 21, 30)]
    driver.step([(request, request.num_tokens // 2) for request in requests])
    while unfinished := [r for r in requests if r.num_computed < r.num_tokens]:
        driver.step(
            [(r, min(1 + i % 2, r.num_tokens - r.num_computed)) for i, r in enumerate(unfinished)]
        )
    for request in requests:
        expected = reference_logprobs(variant_folder, request.token_ids)
        assert largest_gap(driver.logprobs(request), expected) < TOLERANCE


def test_a_torch_without_the_onednn_product_gives_the_same(
    tiny_checkpoint, hand_driver, reference_logprobs, monkeypatch
):
    folder = tiny_checkpoint("llama", attention_bias=True)
    assert project.__globals__["_onednn"]() is not None
    monkeypatch.setitem(project.__globals__, "_onednn", lambda: None)
    driver = hand_driver(folder)
    [ids] = random_tokens(11, 20)
    request = driver.request(ids)
    driver.step([(request, 20)])
    assert largest_gap(driver.logprobs(request), reference_logprobs(folder, ids)) < TOLERANCE


def test_blocks_are_copied_before_the_step_that_needs_them(
    tiny_checkpoint, hand_driver, reference_logprobs
):
    driver = hand_driver(tiny_checkpoint("llama"))
    [prompt], [tail] = random_tokens(5, 10), random_tokens(6, 3)
    leader = driver.request(prompt)
    driver.step([(leader, 10)])
    fork = driver.request(prompt + tail)
    full, partial = leader.block_ids[:2], leader.block_ids[2]
    copy = (partial, fork.block_ids[2])
    fork.block_ids[:2] = full
    fork.num_computed = 10
    leader.token_ids += [7, 8, 9]
    driver.own_blocks(leader)
    driver.step([(leader, 1), (fork, 1)], block_copies=[copy])
    driver.step([(fork, 2), (leader, 2)])
    for request in (leader, fork):
        expected = reference_logprobs(tiny_checkpoint("llama"), request.token_ids)
        assert (
            largest_gap(driver.logprobs(request), expected[-len(driver.logits[request.rid]) :])
            < TOLERANCE
        )


def test_a_block_with_old_nans_does_not_hurt_its_next_owner(tiny_checkpoint, hand_driver):
    driver = hand_driver(tiny_checkpoint("llama"), num_blocks=4)
    [prompt] = random_tokens(7, 9)
    first = driver.request(prompt)
    clean = driver.step([(first, 9)])[0]
    driver.runner.kv_pool.memory.fill_(float("nan"))
    first.num_computed = 0
    assert torch.equal(driver.step([(first, 9)])[0], clean)


def test_results_stay_the_callers_when_the_next_step_runs(tiny_checkpoint, hand_driver):
    driver = hand_driver(tiny_checkpoint("qwen3", head_dim=32))
    requests = [driver.request(ids) for ids in random_tokens(8, 9, 9)]
    first = driver.step([(requests[0], 9)])[0]
    kept = first.clone()
    driver.step([(requests[1], 9)])
    assert torch.equal(first, kept)
    first.div_(2)  # A normal tensor: writing to it outside of inference mode is allowed.


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_bfloat16_rounds_where_transformers_rounds(
    family, tiny_checkpoint, hand_driver, reference_model
):
    folder = tiny_checkpoint(family)
    driver = hand_driver(folder, dtype=torch.bfloat16)
    [ids] = random_tokens(9, 24)
    request = driver.request(ids)
    driver.step([(request, 24)])
    reference = reference_model(folder)
    exact = reference(torch.tensor([ids])).logits[0].log_softmax(-1)
    rounded = copy.deepcopy(reference).to(torch.bfloat16)
    theirs = rounded(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    ours = driver.logprobs(request)
    # With a single key attention adds nothing up, so that every bit must agree; later sums may be in another order.
    assert torch.equal(ours[0], theirs[0])
    assert (ours - exact).abs().mean() < 1.2 * (theirs - exact).abs().mean()


def test_parts_are_named_while_somebody_asks_and_nothing_is_left_of_it(
    tiny_checkpoint, hand_driver
):
    driver = hand_driver(tiny_checkpoint("llama"))
    entered = []

    def named(name):
        entered.append(name)
        return nullcontext()

    before = {name: dict(module.__dict__) for name, module in driver.runner.model.named_modules()}
    driver.runner.name_parts(named)
    driver.step([(driver.request([1, 2]), 2)])
    one_layer = ["norm", "attention", "norm", "ffn"]
    assert entered == [*one_layer, *one_layer, "norm"]
    driver.runner.name_parts(None)
    driver.step([(driver.request([1, 2]), 2)])
    assert len(entered) == 9
    for name, module in driver.runner.model.named_modules():
        assert module.__dict__.keys() == before[name].keys()
