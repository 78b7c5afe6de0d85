"""The demo from end to end, a few steps of it, with the engine in a process of its own."""

import io
import json

import pytest
from rich.console import Console
from typer.testing import CliRunner

from trainers_integration.demo.run import run_demo
from trainers_integration.demo.screen import Screen

ISSUED = {
    *("pass_rate_before", "pass_rate_after", "logprob_gap_max", "num_syncs"),
    *("sync_s_p50", "pause_s_p99", "seconds", "version"),
    *("control_pass_rate_before", "control_pass_rate_after"),
}


def run(config):
    out = io.StringIO()
    summary = run_demo(config, Screen(Console(file=out, width=120)))
    return summary, out.getvalue()


def rewards(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        (r["phase"], r["step"], r["reward"])
        for r in rows
        if r["step"] and r["phase"] != "in_flight"
    ]


@pytest.fixture
def finished(small_demo):
    config = small_demo()
    return config.folder, *run(config)


def test_a_run_leaves_everything_that_it_promises(finished):
    folder, summary, screen = finished
    assert summary == json.loads((folder / "summary.json").read_text())
    assert ISSUED <= summary.keys()
    assert summary["logprob_gap_max"] < 1e-4
    assert summary["num_syncs"] == summary["version"] == 3
    assert 0 < summary["pause_s_p99"] < summary["sync_s_p99"] < 60
    for name in ("learning", "logprob_gap", "timeline", "sync"):
        assert (folder / f"{name}.png").exists()
        assert f"{name}.png" in screen
    assert str(folder / "report.html") in screen

    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(folder / "checkpoint")


def test_the_same_seed_repeats_a_synchronous_run(small_demo):
    results = []
    for name in ("first", "again"):
        config = small_demo(f"name={name}", "seed=5", "in_flight_steps=0")
        run(config)
        results.append(rewards(config.folder))
    assert results[0] == results[1]
    assert len({reward for _, _, reward in results[0]}) > 1


def test_the_asynchronous_run_publishes_after_every_optimiser_step(small_demo):
    config = small_demo("mode=async", "control_steps=0", "grpo.steps=4")
    summary, _ = run(config)
    assert summary["num_syncs"] == summary["version"] == 8
    assert summary["control_pass_rate_after"] is None
    timeline = json.loads((config.folder / "timeline.json").read_text())
    assert len(timeline["commits"]) == 6  # of the last three steps
    assert len(timeline["requests"]) == 3 * 8 * 4


def test_a_users_own_data_set_is_used(small_demo, tmp_path):
    path = tmp_path / "mine.jsonl"
    lines = [
        {"prompt": f"{n}=", "answer": str(n), "split": "train" if n < 8 else "heldout"}
        for n in range(10)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = small_demo(
        f'data.path="{path}"', "control_steps=0", "in_flight_steps=0", "grpo.steps=1"
    )
    _, screen = run(config)
    assert "8 training prompts and 2 held-out ones" in screen.replace("\n", "")


def test_an_error_of_the_user_is_one_line(tmp_path):
    from rollout.cli.app import build_app
    from rollout.errors import ConfigError

    result = CliRunner().invoke(
        build_app(),
        [
            "demo",
            "--set",
            f'data.path="{tmp_path}/nowhere.jsonl"',
            "--set",
            f'runs_dir="{tmp_path}"',
        ],
    )
    assert isinstance(result.exception, ConfigError)
    assert "nowhere.jsonl" in str(result.exception)
    assert "\n" not in str(result.exception)
