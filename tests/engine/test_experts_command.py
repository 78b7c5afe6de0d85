"""`rollout experts` counts where tokens go in a running engine, and draws it."""

from __future__ import annotations

import json
import threading

import numpy as np
import pytest

from rollout import Engine
from rollout.cli.app import run
from rollout.cli.experts import draw_experts
from rollout.errors import ConfigError

MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 16}


@pytest.fixture
def rollout(monkeypatch, capsys):
    """The console command in this process: its exit status and what it printed."""
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.delenv("ROLLOUT_ADDRESS", raising=False)

    def call(*arguments):
        with pytest.raises(SystemExit) as ended:
            run(["experts", *(str(argument) for argument in arguments)])
        captured = capsys.readouterr()
        return ended.value.code, captured.out + captured.err

    return call


def test_tokens_of_a_running_engine_are_counted_and_drawn(tiny_checkpoint, rollout, tmp_path):
    folder = tiny_checkpoint("qwen3_moe", mlp_only_layers=[0], num_hidden_layers=3, **MOE)
    picture, kept = tmp_path / "experts.png", tmp_path / "counts.json"
    params = {"max_new_tokens": 8, "ignore_eos": True}
    done = threading.Event()
    with Engine(folder, skip_tokenizer_init=True, kv_cache_bytes=2 << 20) as engine:

        def work() -> None:
            while not done.is_set():
                engine.generate(input_ids=[[5, 9, 2]] * 4, sampling_params=params)

        worker = threading.Thread(target=work)
        worker.start()
        try:
            code, text = rollout(
                engine.address, "--seconds", 0.5, "--out", picture, "--counts", kept
            )
        finally:
            done.set()
            worker.join()
    assert code == 0, text
    counts = np.array(json.loads(kept.read_text()))
    assert counts.shape == (3, 8) and not counts[0].any()
    assert counts[1].sum() == counts[2].sum() > 0
    assert f"{counts.sum():,} choices" in text
    assert picture.read_bytes().startswith(b"\x89PNG")
    again = tmp_path / "again.svg"
    code, text = rollout("--from", kept, "--out", again)
    assert code == 0 and "<svg" in again.read_text()


def test_busy_and_idle_experts_are_told(rollout, tmp_path):
    counts = np.full((48, 128), 10)
    counts[3, 7], counts[3, 8] = 1290, 0
    (tmp_path / "counts.json").write_text(json.dumps(counts.tolist()))
    draw_experts(counts, tmp_path / "large.png")
    code, text = rollout("--from", tmp_path / "counts.json")
    [row] = [line for line in text.splitlines() if line.strip("│ ").startswith("3 ")]
    assert code == 0 and row.strip("│ ").split() == ["3", "│", "7", "│", "64.75", "│", "1"]


def test_what_cannot_be_drawn_says_so(rollout, tmp_path):
    with pytest.raises(ConfigError, match="got 0 choices"):
        draw_experts(np.zeros((2, 4), int), tmp_path / "nothing.png")
    code, text = rollout("--from", tmp_path / "missing.json")
    assert code == 1 and "missing.json" in text and "as --counts writes" in text
    code, text = rollout()
    assert code == 1 and "got neither ADDRESS nor --from" in text
