"""Penalties, biases and minimum lengths: the edited logits against a plain loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rollout.layers.logit_edits import edit_logits, is_editable, is_edited
from rollout.sampling_params import SamplingParams
from rollout.scheduling import Request

VOCAB = 500


def make_request(prompt: list[int], output: list[int], **params: Any) -> Request:
    request = Request(
        rid="r", prompt_ids=prompt, params=SamplingParams(**params), stop_ids=(7, VOCAB - 1)
    )
    request.token_ids += output
    return request


def reference(logits: torch.Tensor, request: Request) -> torch.Tensor:
    params, output = request.params, request.output_ids
    z = logits.double().clone()
    for token in set(request.token_ids):
        repeated = z[token] / params.repetition_penalty, z[token] * params.repetition_penalty
        z[token] = repeated[0] if z[token] > 0 else repeated[1]
    for token in set(output):
        z[token] -= params.frequency_penalty * output.count(token)
        z[token] -= params.presence_penalty
    for token, bias in (params.logit_bias or {}).items():
        z[token] += bias
    if len(output) < params.min_new_tokens:
        z[list(request.stop_ids)] = float("-inf")
    return z


CASES: list[dict[str, Any]] = [
    {"repetition_penalty": 1.5},
    {"repetition_penalty": 0.5},
    {"frequency_penalty": 0.3},
    {"presence_penalty": -1.0},
    {"repetition_penalty": 1.2, "frequency_penalty": -0.2, "presence_penalty": 0.7},
    {"logit_bias": {0: 3.0, 7: -2.5, VOCAB - 1: 1.0}},
    {"min_new_tokens": 100},
    {"min_new_tokens": 100, "presence_penalty": 0.5, "logit_bias": {7: 50.0}},
    {},
]


@pytest.mark.parametrize("num_output", [0, 1, 99, 100, 400])
def test_edits_are_those_of_the_plain_loop(num_output: int) -> None:
    generator = torch.Generator().manual_seed(num_output)
    logits = torch.randn(len(CASES), VOCAB, generator=generator) * 3
    requests = []
    for case in CASES:
        ids = torch.randint(0, VOCAB, (30 + num_output,), generator=generator).tolist()
        requests.append(make_request(ids[:30], ids[30:], max_new_tokens=500, **case))
    want = torch.stack([reference(row, r) for row, r in zip(logits, requests, strict=True)])
    edit_logits(logits, requests)
    torch.testing.assert_close(logits.double(), want, atol=1e-5, rtol=1e-5)


def test_counts_that_grow_step_by_step_are_those_of_the_whole_output() -> None:
    generator = torch.Generator().manual_seed(0)
    params = {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": 0.2}
    request = make_request([1, 1, 2], [], **params)
    for _ in range(200):
        logits = torch.randn(1, VOCAB, generator=generator)
        want = reference(logits[0], request)
        edit_logits(logits, [request])
        torch.testing.assert_close(logits[0].double(), want, atol=1e-5, rtol=1e-5)
        request.token_ids.append(int(torch.randint(0, VOCAB, (1,), generator=generator)))


def test_only_requests_that_ask_are_edited_and_only_as_long() -> None:
    assert not is_editable(SamplingParams(temperature=0.5, top_k=3))
    assert all(is_editable(SamplingParams(**case)) == bool(case) for case in CASES)
    flags = [is_edited(make_request([1], [2] * n, min_new_tokens=3)) for n in range(5)]
    assert flags == [True, True, True, False, False]
