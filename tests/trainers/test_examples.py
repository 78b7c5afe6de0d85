"""The examples run as they stand."""

import subprocess
import sys
from pathlib import Path

import pytest

from trainers_integration.demo.config import ModelConfig
from trainers_integration.demo.model import build_model, save_checkpoint
from trainers_integration.demo.tokenizer import build_tokenizer

SAYS = {
    "push_weights.py": ["'step 3'", "bit for bit"],
    "torch_distributed_trainer.py": [
        "'step 1'",
        "both ranks serve the trainer's weights, bit for bit",
    ],
    "colocated.py": ["released", "'step 1'", "{'version': 'step 1'"],
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    model = build_model(ModelConfig(hidden_size=32, num_layers=2), seed=0)
    save_checkpoint(folder, model, build_tokenizer())
    return folder


@pytest.mark.parametrize("name", SAYS)
def test_an_example_runs_and_says_what_it_shows(name: str, checkpoint: Path) -> None:
    result = subprocess.run(
        [sys.executable, f"examples/{name}", str(checkpoint)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    for words in SAYS[name]:
        assert words in result.stdout, result.stdout


def test_two_ranks_publish_their_shards_into_an_engine_of_two(tmp_path):
    model = build_model(ModelConfig(hidden_size=32, num_layers=2), seed=0)
    save_checkpoint(tmp_path, model, build_tokenizer())
    result = subprocess.run(
        [sys.executable, "examples/spmd_trainer.py", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert "rank 0: version 3 ('step 3')" in result.stdout
    assert "rank 1: version 3 ('step 3')" in result.stdout
    assert "bit for bit" in result.stdout


def test_a_pool_survives_the_death_of_a_replica(checkpoint: Path) -> None:
    result = subprocess.run(
        [sys.executable, "examples/ray_pool.py", str(checkpoint), "--executor", "local"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    for words in ("'step 1'", "64 samples", "ran again", "bit for bit"):
        assert words in result.stdout, result.stdout
