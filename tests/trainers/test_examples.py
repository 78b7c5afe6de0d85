"""The examples run as they stand."""

import subprocess
import sys

from trainers_integration.demo.config import ModelConfig
from trainers_integration.demo.model import build_model, save_checkpoint
from trainers_integration.demo.tokenizer import build_tokenizer


def test_pushing_weights_under_a_running_request_shows_in_its_versions(tmp_path):
    model = build_model(ModelConfig(hidden_size=32, num_layers=2), seed=0)
    save_checkpoint(tmp_path, model, build_tokenizer())
    result = subprocess.run(
        [sys.executable, "examples/push_weights.py", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert "'step 3'" in result.stdout
    assert "bit for bit" in result.stdout
