"""The backend of fused kernels against transformers, in triton's interpreter; on a GPU it is the default.

The interpreter is chosen when triton is imported, so the tests that run in it are run by a process of their own.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys

import pytest
import torch

from rollout.errors import ConfigError
from rollout.runner.attention_backend import DrawnTokens
from rollout.runner.backend_registry import resolve_backend
from rollout.scheduling.request import PENDING

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="run by the test below, in the interpreter"
)


def test_the_tests_of_this_file_pass_in_the_interpreter():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "fused_", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0 and "6 passed" in done.stdout, done.stdout + done.stderr


@interpreted
@pytest.mark.parametrize(
    ("family", "options"),
    [
        (
            "qwen3",
            {
                "head_dim": 16,
                "use_sliding_window": True,
                "sliding_window": 6,
                "layer_types": ["sliding_attention", "full_attention"],
            },
        ),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        (
            "glm4_moe",
            {
                "head_dim": 32,
                "n_routed_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 32,
                "first_k_dense_replace": 1,
                "use_qk_norm": True,
            },
        ),
    ],
)
def test_fused_chunks_mixtures_and_single_tokens_agree(
    family, options, tiny_checkpoint, hand_driver, reference_logprobs
):
    folder = tiny_checkpoint(family, **options)
    driver = hand_driver(folder, attention_backend="triton")
    rng = random.Random(0)
    requests = [driver.request([rng.randrange(256) for _ in range(size)]) for size in (9, 4)]
    for sizes in ((7, 2), (1, 2), (1, 0)):
        driver.step([(r, size) for r, size in zip(requests, sizes, strict=True) if size])
    for request in requests:
        expected = reference_logprobs(folder, request.token_ids)
        assert (driver.logprobs(request) - expected).abs().max() < 1e-4


@interpreted
def test_fused_steps_take_tokens_that_the_host_does_not_know_from_the_device(
    tiny_checkpoint, hand_driver, reference_logprobs
):
    folder = tiny_checkpoint("llama")
    driver = hand_driver(folder, attention_backend="triton")
    check_pending_tokens(driver, folder, reference_logprobs)


@interpreted
def test_fused_steps_of_padding_leave_everything_as_it_was(tiny_checkpoint, hand_driver):
    driver = hand_driver(tiny_checkpoint("llama"), attention_backend="triton")
    memory = driver.runner.kv_pool.memory
    memory.copy_(torch.randn(memory.shape))
    before = memory.clone()
    with torch.inference_mode():
        for num_decodes, num_tokens in ((3, 20), (3, 0), (0, 20)):
            states = driver.runner.backend.compute_padding(num_decodes, num_tokens, 64)
            assert len(states) == num_decodes + num_tokens and states.isfinite().all()
    assert torch.equal(memory, before)


@interpreted
def test_fused_steps_that_a_graph_would_hold_count_no_experts(tiny_checkpoint, hand_driver):
    """They may be captured while somebody counts: after memory was released and resumed."""
    from rollout.runner.cuda_graph_runner import _Kind, _padding

    folder = tiny_checkpoint(
        "qwen3_moe", head_dim=32, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
    )
    runner = hand_driver(folder, attention_backend="triton").runner
    runner.init_device_graphs(64)
    counts = runner.count_experts(True)
    with torch.inference_mode():
        inputs = runner.backend.staging.upload(_padding(2))
        runner.graphs._body(_Kind(size=2), inputs)
    assert not counts.any()
    mixtures = [part for part in runner.model.modules() if hasattr(part, "counts")]
    assert mixtures and all(part.counts is not None for part in mixtures)


def test_torch_steps_take_tokens_that_the_host_does_not_know_from_the_device(
    tiny_checkpoint, hand_driver, reference_logprobs
):
    folder = tiny_checkpoint("llama")
    driver = hand_driver(folder, attention_backend="torch")
    check_pending_tokens(driver, folder, reference_logprobs)


def check_pending_tokens(driver, folder, reference_logprobs):
    requests = [driver.request(ids) for ids in ([1, 2, 3, 4], [5, 6], [9, 8, 7])]
    driver.step([(request, request.num_tokens) for request in requests[:2]])
    drawn = [11, 12, 13]
    for request in requests[:2]:
        request.token_ids.append(PENDING)
        driver.own_blocks(request)
    driver.step(
        [(requests[0], 1), (requests[1], 1), (requests[2], 3)],
        drawn=DrawnTokens(
            torch.tensor([7, 11, 12], dtype=torch.int32), {requests[0]: 1, requests[1]: 2}
        ),
    )
    for request, token in zip(requests[:2], drawn, strict=False):
        request.token_ids[-1] = token
    for request in requests:
        expected = reference_logprobs(folder, request.token_ids)
        assert (driver.logprobs(request) - expected).abs().max() < 1e-4


def test_the_backend_is_chosen_by_device_and_an_unknown_one_is_refused():
    assert resolve_backend("auto", "cpu") == "torch"
    assert resolve_backend("auto", "cuda:1") == "triton"
    assert resolve_backend("torch", "cuda") == "torch"
    with pytest.raises(ConfigError, match=r"attention_backend: got .flush., expected"):
        resolve_backend("flush", "cpu")
