"""The backend around torch's paged attention: what it asks of `varlen_attn`, and where it is refused.

Where there is no GPU, a stand-in with the same contract attends, and triton's interpreter, which is chosen when triton
is imported, runs the rest of a step; so those tests are run by a process of their own.
"""

from __future__ import annotations

import dataclasses
import os
import random
import subprocess
import sys

import flash_stand_in
import pytest
import torch
from bfloat16_errors import errors_of

from rollout import Engine
from rollout.errors import ConfigError
from rollout.runner import backend_registry
from rollout.runner.attention_backend import BackendNeeds

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="run by the test below, in the interpreter"
)
WINDOWS = {
    "head_dim": 16,
    "use_sliding_window": True,
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention"],
}


def test_the_tests_of_this_file_pass_in_the_interpreter():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "steps_", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0 and "4 passed" in done.stdout, done.stdout + done.stderr


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", flash_stand_in.varlen_attn)
    entry = backend_registry.BACKENDS["flash"]
    monkeypatch.setitem(
        backend_registry.BACKENDS, "flash", dataclasses.replace(entry, why_not=lambda needs: None)
    )


@interpreted
@pytest.mark.parametrize(("family", "options"), [("qwen3", WINDOWS), ("llama", {})])
def test_steps_of_chunks_mixtures_and_single_tokens_agree(
    family, options, stand_in, tiny_checkpoint, hand_driver, reference_logprobs
):
    folder = tiny_checkpoint(family, max_position_embeddings=512, **options)
    driver = hand_driver(folder, attention_backend="flash", block_size=256, num_blocks=8)
    rng = random.Random(0)
    requests = [driver.request([rng.randrange(256) for _ in range(size)]) for size in (262, 6)]
    for sizes in ((7, 0), (253, 4), (1, 1), (1, 1)):
        driver.step([(r, size) for r, size in zip(requests, sizes, strict=True) if size])
    for request in requests:
        expected = reference_logprobs(folder, request.token_ids)
        assert (driver.logprobs(request) - expected).abs().max() < 1e-4


@interpreted
def test_steps_of_another_implementation_have_pages_of_any_size(
    stand_in, monkeypatch, tiny_checkpoint, hand_driver, reference_logprobs
):
    monkeypatch.setattr("rollout.runner.flash_backend.is_built_in", lambda: False)
    folder = tiny_checkpoint("qwen3", **WINDOWS)
    driver = hand_driver(folder, attention_backend="flash", block_size=4)
    requests = [driver.request(range(size)) for size in (9, 4)]
    for sizes in ((7, 3), (1, 1), (1, 0)):
        driver.step([(r, size) for r, size in zip(requests, sizes, strict=True) if size])
    for request in requests:
        expected = reference_logprobs(folder, request.token_ids)
        assert (driver.logprobs(request) - expected).abs().max() < 1e-4


@interpreted
def test_steps_of_an_engine_give_what_those_of_the_triton_backend_give(stand_in, tiny_checkpoint):
    folder = tiny_checkpoint("qwen3", **WINDOWS)
    found = []
    for backend in ("triton", "flash"):
        with Engine(
            folder,
            attention_backend=backend,
            kv_cache_bytes=8 << 20,
            max_running_requests=6,
            context_length=64,
            overlap=True,
        ) as engine:
            results = engine.generate(
                input_ids=[list(range(20)), [5, 9]],
                sampling_params=[
                    {"max_new_tokens": 3, "n": 4, "sampling_seed": 1, "ignore_eos": True},
                    {"max_new_tokens": 5, "temperature": 0, "ignore_eos": True},
                ],
                return_logprob=True,
            )
        found.append(results)
    for triton, flash in zip(*found, strict=True):
        assert flash["output_ids"] == triton["output_ids"]
        for got, want in zip(
            flash["meta_info"]["output_token_logprobs"],
            triton["meta_info"]["output_token_logprobs"],
            strict=True,
        ):
            assert got[0] == pytest.approx(want[0], abs=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("family", "options"), [("qwen3", {**WINDOWS, "head_dim": 64}), ("llama", {})]
)
def test_on_a_gpu_it_attends_as_transformers_does_or_says_why_it_cannot(
    family, options, tiny_checkpoint
):
    from rollout.runner.flash_backend import paged_attention

    folder = tiny_checkpoint(family, max_position_embeddings=1024, **options)
    if paged_attention() is None:
        with pytest.raises(ConfigError, match="varlen_attn has no block tables"):
            Engine(folder, device="cuda", dtype="bfloat16", attention_backend="flash")
        return
    for graphs in (True, False):
        errors = errors_of(
            *(folder, "cuda"),
            longest=400,
            attention_backend="flash",
            block_size=256,
            disable_cuda_graph=not graphs,
        )
        assert errors.engine <= 1.5 * errors.transformers + 1e-3, errors


NEEDS = {"device": torch.device("cuda"), "dtype": torch.bfloat16, "head_dim": 64, "block_size": 256}


@pytest.mark.parametrize(
    ("needs", "reason"),
    [
        ({"dtype": torch.float32}, "torch.float32, expected torch.float16 or torch.bfloat16"),
        ({"head_dim": 264}, "heads of 264, expected a multiple of 8 up to 256"),
        ({"head_dim": 20}, "heads of 20, expected"),
        ({"block_size": 64}, "block_size 64, expected a multiple of 256"),
    ],
)
def test_what_flash_attention_cannot_do_is_refused(needs, reason, monkeypatch):
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", flash_stand_in.varlen_attn)
    from rollout.runner.flash_backend import why_not

    assert why_not(BackendNeeds(**NEEDS)) is None
    assert reason in why_not(BackendNeeds(**{**NEEDS, **needs}))


def test_a_torch_without_block_tables_is_refused(monkeypatch):
    def older(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=()):
        raise AssertionError

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", older)
    from rollout.runner.flash_backend import why_not

    reason = why_not(BackendNeeds(**NEEDS))
    assert reason == (
        f"torch {torch.__version__}, whose varlen_attn has no block tables, expected 2.12 or later"
    )


@pytest.mark.parametrize(
    ("backend", "reason"),
    [
        ("flash", r"attention_backend 'flash': got device cpu, expected CUDA; leave it out"),
        ("triton", r"attention_backend 'triton': got device cpu, expected CUDA \(or TRITON_"),
    ],
)
def test_a_cpu_is_refused(backend, reason, tiny_checkpoint, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match=reason):
        Engine(tiny_checkpoint("llama"), device="cpu", attention_backend=backend)


def test_the_choice_and_what_stands_against_others_are_logged(tiny_checkpoint, hand_driver, caplog):
    with caplog.at_level("INFO", "rollout.runner.backend_registry"):
        hand_driver(tiny_checkpoint("llama"))
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("attention backend on cpu: torch (others: triton not: device cpu")
    assert "flash not: device cpu, expected CUDA" in message
