"""A trainer of several processes publishes its shards: real DTensors over gloo, real engines."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rollout import Engine

sys.path.insert(0, str(Path(__file__).parent))
import spmd_support

HERE = Path(__file__).parent
ODD = {"vocab_size": 291, "intermediate_size": 90}
"""Sizes that four ranks cannot share evenly."""
CHECKS = (
    "fingerprints",
    "every_way_of_cutting",
    "steady_state",
    "casts",
    "tied_weights",
    "errors_reach_every_rank",
    "one_engine_per_row",
    "engines_elsewhere",
    "a_late_rank_costs_one_update",
    "a_publisher_that_nobody_closed",
    "the_call_of_existing_trainers",
    "an_engine_that_takes_whole_tensors",
)


@pytest.fixture(scope="module")
def folder(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("llama", tie_word_embeddings=False, **ODD)


@pytest.fixture(scope="module")
def tied_folder(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("llama", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def engines(folder: Path, tied_folder: Path) -> Iterator[list[Engine]]:
    options: dict[str, Any] = {"kv_cache_bytes": 1 << 20, "skip_tokenizer_init": True}
    with (
        Engine(folder, **options) as one,
        Engine(folder, executor="local", tp_size=2, num_threads=1, **options) as two,
        Engine(tied_folder, **options) as of_tied,
    ):
        yield [one, two, of_tied]


def launch(script: str, world: int, store: Path, *arguments: str) -> list[subprocess.Popen[str]]:
    return [
        subprocess.Popen(
            [sys.executable, str(HERE / script), str(rank), str(world), str(store), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]


def ended(processes: list[subprocess.Popen[str]], timeout_s: float) -> list[tuple[str, str]]:
    """Output and errors of every rank; a rank that does not end by itself is a failure."""
    try:
        return [process.communicate(timeout=timeout_s) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()


@pytest.fixture(scope="module")
def passed(
    engines: list[Engine], folder: Path, tied_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[str], str]:
    """The checks that four ranks have passed, and what they said otherwise: one launch for all of them."""
    store = tmp_path_factory.mktemp("spmd") / "store"
    addresses = [engine.address for engine in engines]
    processes = launch("spmd_rank.py", 4, store, str(folder), str(tied_folder), *addresses)
    output = ended(processes, 120)
    errors = "\n".join(f"rank {rank}: {text}" for rank, (_, text) in enumerate(output) if text)
    return output[0][0].splitlines(), errors


@pytest.mark.parametrize("check", CHECKS)
def test_four_ranks_publish_their_shards(passed: tuple[list[str], str], check: str) -> None:
    lines, errors = passed
    assert f"passed {check}" in lines, errors[-4000:]


def test_an_engine_serves_what_the_ranks_published(
    passed: tuple[list[str], str], engines: list[Engine], folder: Path
) -> None:
    """The last full batch reached the engine of two ranks: its logprobs are those of a model with these weights."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    named = spmd_support.stepped(spmd_support.checkpoint(folder), 60)
    model.load_state_dict(named)
    prompt = [3, 5, 8, 13, 21]
    result = engines[1].generate(
        input_ids=prompt,
        sampling_params={"temperature": 0.0, "max_new_tokens": 8, "ignore_eos": True},
        return_logprob=True,
    )
    ids = prompt + result["output_ids"]
    with torch.no_grad():
        rows = torch.log_softmax(model(torch.tensor([ids])).logits[0, len(prompt) - 1 : -1], -1)
    assert rows.argmax(-1).tolist() == result["output_ids"]
    got = [value for value, _, _ in result["meta_info"]["output_token_logprobs"]]
    assert got == pytest.approx(rows.max(-1).values.tolist(), abs=1e-4)


@pytest.mark.parametrize("culprit", ["0", "1"])
def test_a_rank_that_is_killed_costs_the_others_an_error_and_the_engine_nothing(
    engines: list[Engine], folder: Path, tmp_path: Path, culprit: str
) -> None:
    engine = engines[0]
    before = engine.weights_fingerprint(), engine.status().weight_version
    processes = launch(
        "spmd_killed_rank.py", 2, tmp_path / "store", str(folder), engine.address, culprit
    )
    output = ended(processes, 60)
    survivor = output[1 - int(culprit)]
    assert "TrainerDiedError" in survivor[0], survivor
    assert processes[int(culprit)].returncode == -9
    assert (engine.weights_fingerprint(), engine.status().weight_version) == before
    engine.begin_weight_update()  # no session is left open
    engine.abort_weight_update()
