"""The scripts of TRL's page, as a user types them."""

import json
import subprocess
import sys

import pytest
from trl_support import write_checkpoint

pytestmark = [pytest.mark.trl, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sorting")
    write_checkpoint(folder)
    return folder


def run(name, *words):
    command = [sys.executable, f"examples/{name}", *map(str, words)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_trainer_with_one_line_more(checkpoint):
    said = run("trl_grpo.py", checkpoint, "--steps", 3, "--batch", 16)
    assert "step 2 was sampled from last" in said
    assert "right answers" in said


def test_curves_of_both_trainers_are_drawn_with_their_numbers_beside(checkpoint, tmp_path):
    curve = tmp_path / "curve.png"
    sizes = ["--steps", 3, "--async-steps", 4, "--batch", 16]
    said = run("trl_curves.py", checkpoint, *sizes, "--curve", curve)
    assert curve.read_bytes().startswith(b"\x89PNG")
    numbers = json.loads(curve.with_suffix(".json").read_text())
    assert [len(row) for row in numbers["GRPO"].values()] == [3] * 2
    assert [len(row) for row in numbers["AsyncGRPO"].values()] == [4] * 3
    # What each step was sampled from is the trainer's policy of then, or at most two updates old.
    assert max(numbers["GRPO"]["apart"]) < 1e-4
    assert max(numbers["AsyncGRPO"]["staleness"]) <= 2
    assert numbers["AsyncGRPO"]["ratio"][0] == pytest.approx(1.0, abs=1e-4)
    for words in ("GRPO: right answers", "in 4 steps", "differ by at most", "updates old"):
        assert words in said, said
