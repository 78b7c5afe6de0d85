"""Decode steps in one piece on two ranks: the tokens and log-probabilities of one rank, whatever happens in between.

On a CPU the ranks run them in triton's interpreter over gloo; on two GPUs they are graphs with their collectives.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from versions import TOLERANCE, Reference, output_logprobs, version_weights

from rollout import Engine

PROMPTS = [[5, 9, 2], [7] * 18, [11, 12, 13, 14, 15, 16, 17], list(range(20, 37))]
KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0, "max_new_tokens": 5},
    {"temperature": 1.0, "max_new_tokens": 6, "sampling_seed": 1},
    {"temperature": 0.7, "top_p": 0.8, "top_k": 40, "max_new_tokens": 4, "sampling_seed": 2},
    {"temperature": 1.0, "max_new_tokens": 3, "sampling_seed": 4, "frequency_penalty": 0.5},
]
SHORT = {"temperature": 0.0, "max_new_tokens": 3, "ignore_eos": True}
LONG = {"cpu": 14, "cuda": 400}
"""Tokens of a request in whose midst things happen."""
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 GPUs")


@pytest.fixture(scope="module")
def folder(tiny_checkpoint: Callable[..., Path]) -> Path:
    # A vocabulary that two ranks share unevenly.
    return tiny_checkpoint("qwen3", head_dim=32, vocab_size=289)


@pytest.fixture(scope="module")
def one(folder: Path) -> Iterator[Engine]:
    with Engine(folder, kv_cache_bytes=4 << 20, seed=0, device="cpu") as engine:
        yield engine


@pytest.fixture(scope="module")
def interpreted(folder: Path) -> Iterator[Engine]:
    """Two ranks whose steps are those of a GPU, one step ahead."""
    pytest.importorskip("triton")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        with Engine(
            folder,
            executor="local",
            tp_size=2,
            device="cpu",
            attention_backend="triton",
            overlap=True,
            kv_cache_bytes=2 << 20,
            num_threads=1,
            seed=0,
        ) as engine:
            yield engine


def on_two_gpus(folder: Path, **options: Any) -> Engine:
    return Engine(
        folder,
        executor="local",
        tp_size=2,
        device="cuda",
        dtype="float32",
        kv_cache_bytes=8 << 20,
        seed=0,
        **options,
    )


@pytest.fixture(scope="module")
def graphed(folder: Path) -> Iterator[Engine]:
    """Two GPUs, decode steps as graphs."""
    with on_two_gpus(folder) as engine:
        yield engine


@pytest.fixture(scope="module")
def launched(folder: Path) -> Iterator[Engine]:
    """Two GPUs, decode steps kernel by kernel, sums by NCCL."""
    with on_two_gpus(folder, disable_cuda_graph=True, disable_custom_all_reduce=True) as engine:
        yield engine


def each(function: Callable[..., None]) -> Any:
    """The same check for all engines of two ranks."""
    cases = [
        pytest.param("interpreted", id="cpu"),
        pytest.param("graphed", id="cuda", marks=[pytest.mark.gpu, two_gpus]),
        pytest.param("launched", id="cuda kernel by kernel", marks=[pytest.mark.gpu, two_gpus]),
    ]
    return pytest.mark.parametrize("name", cases)(function)


def long(engine: Engine) -> dict[str, Any]:
    """Parameters of a long request."""
    return {"temperature": 0.0, "max_new_tokens": LONG[engine.config.device], "ignore_eos": True}


def start_long(engine: Engine, prompt: list[int]) -> Callable[[], dict[str, Any]]:
    """A long request whose first token has come; to be called for its end."""
    begun, chunks = threading.Event(), []

    def run() -> None:
        for chunk in engine.generate(
            input_ids=prompt,
            sampling_params=long(engine),
            stream=True,
            return_logprob=True,
            rid="long",
        ):
            chunks.append(chunk)
            begun.set()

    thread = threading.Thread(target=run)
    thread.start()
    assert begun.wait(60)

    def end() -> dict[str, Any]:
        thread.join(120)
        last: dict[str, Any] = chunks[-1]
        return last

    return end


@each
def test_tokens_and_logprobs_are_those_of_one_rank(
    name: str, one: Engine, request: pytest.FixtureRequest
) -> None:
    alone, together = (
        engine.generate(
            input_ids=PROMPTS,
            sampling_params=[{"ignore_eos": True, **kind} for kind in KINDS],
            return_logprob=True,
        )
        for engine in (one, request.getfixturevalue(name))
    )
    for a, b in zip(alone, together, strict=True):
        assert b["output_ids"] == a["output_ids"]
        assert output_logprobs(b) == pytest.approx(output_logprobs(a), abs=10 * TOLERANCE)


@each
def test_scores_of_prompts_and_of_other_tokens_are_those_of_one_rank(
    name: str, one: Engine, request: pytest.FixtureRequest
) -> None:
    alone, together = (
        engine.generate(
            input_ids=PROMPTS[2:],
            sampling_params={"max_new_tokens": 2, "temperature": 0.0, "ignore_eos": True},
            return_logprob=True,
            logprob_start_len=[0, 9],
            top_logprobs_num=[3, 0],
            token_ids_logprob=[[3], [7, 250]],
        )
        for engine in (one, request.getfixturevalue(name))
    )
    for a, b in zip(alone, together, strict=True):
        for key in ("input_token_logprobs", "output_token_logprobs"):
            check_same(a["meta_info"][key], b["meta_info"][key])
        for side in ("input", "output"):
            for key in (f"{side}_top_logprobs", f"{side}_token_ids_logprobs"):
                wanted = a["meta_info"].get(key) or []
                got = b["meta_info"].get(key) or []
                assert len(got) == len(wanted)
                for x, y in zip(wanted, got, strict=True):
                    check_same(x or [], y or [])


def check_same(wanted: list[Any], got: list[Any]) -> None:
    """(log-probability, token, text) each."""
    assert [token for _, token, *_ in got] == [token for _, token, *_ in wanted]
    for (x, *_), (y, *_) in zip(wanted, got, strict=True):
        assert (x is None) == (y is None)
        assert x is None or y == pytest.approx(x, abs=10 * TOLERANCE)


@each
def test_each_token_has_the_logprob_of_its_version_while_updates_come(
    name: str, folder: Path, request: pytest.FixtureRequest
) -> None:
    engine: Engine = request.getfixturevalue(name)
    engine.update_weights_from_tensor(version_weights(folder, 0))  # connects
    first = engine.version
    end = start_long(engine, PROMPTS[0])
    for number in (1, 2):
        engine.update_weights_from_tensor(
            version_weights(folder, number), kv_policy="recompute", weight_version=str(number)
        )
    result = end()
    spans = result["meta_info"]["weight_versions"]
    assert len(spans) > 1 and spans[-1]["end"] == LONG[engine.config.device]
    reference, output, got = Reference(folder), result["output_ids"], output_logprobs(result)
    for span in spans:
        part = slice(span["start"], span["end"])
        wanted = reference.at(span["number"] - first).logprobs(PROMPTS[0], output)[part]
        assert got[part] == pytest.approx(wanted, abs=10 * TOLERANCE)
    engine.update_weights_from_tensor(version_weights(folder, 0))


@each
def test_aborts_and_memory_that_comes_back_leave_the_ranks_in_step(
    name: str, one: Engine, request: pytest.FixtureRequest
) -> None:
    engine: Engine = request.getfixturevalue(name)
    end = start_long(engine, PROMPTS[2])
    engine.abort_request("long")
    assert end()["meta_info"]["finish_reason"]["type"] == "abort"
    end = start_long(engine, PROMPTS[1])
    engine.pause_generation(mode="retract")
    engine.release_memory_occupation(keep_weights=True)
    engine.resume_memory_occupation()
    engine.continue_generation()
    expected = one.generate(input_ids=PROMPTS[1], sampling_params=long(engine), return_logprob=True)
    result = end()
    assert result["output_ids"] == expected["output_ids"]
    assert output_logprobs(result) == pytest.approx(output_logprobs(expected), abs=10 * TOLERANCE)
    expected, result = (
        [r["output_ids"] for r in e.generate(input_ids=PROMPTS[:2], sampling_params=SHORT)]
        for e in (one, engine)
    )
    assert result == expected
    assert engine.status().num_free_blocks == engine.status().num_blocks


@pytest.mark.gpu
@two_gpus
@pytest.mark.parametrize("options", [{}, {"disable_custom_all_reduce": True}], ids=str)
def test_two_gpus_err_in_bfloat16_no_more_than_one(options: dict[str, Any], folder: Path) -> None:
    params = {"temperature": 1.0, "max_new_tokens": 60, "ignore_eos": True, "sampling_seed": 3}
    errors = {}
    with Engine(folder, device="cuda", dtype="float32", kv_cache_bytes=8 << 20) as exact:
        for tp_size in (1, 2):
            ranks = {"executor": "local", "tp_size": tp_size, **options}
            with Engine(
                folder, device="cuda", dtype="bfloat16", kv_cache_bytes=8 << 20, **ranks
            ) as engine:
                results = engine.generate(
                    input_ids=PROMPTS, sampling_params=params, return_logprob=True
                )
            got = torch.tensor([output_logprobs(result) for result in results])
            known = exact.generate(
                input_ids=[p + r["output_ids"] for p, r in zip(PROMPTS, results, strict=True)],
                sampling_params={"max_new_tokens": 0},
                return_logprob=True,
                logprob_start_len=0,
            )
            wanted = torch.tensor(
                [[v for v, _, _ in r["meta_info"]["input_token_logprobs"]][-60:] for r in known]
            )
            errors[tp_size] = float((got - wanted).abs().mean())
    assert errors[2] < 1.5 * errors[1] + 1e-3
