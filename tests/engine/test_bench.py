"""Benchmarks at their smallest: they run, and their files say what was measured, where, and next to what."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rollout.errors import ConfigError
from rollout.settings import load_settings
from rollout_benchmarks.figures import figure_of
from rollout_benchmarks.generate import run_generate
from rollout_benchmarks.gpu import run_gpu
from rollout_benchmarks.gpu_experts import experts_touched, floor_bytes, run_gpu_experts
from rollout_benchmarks.gpu_generate import num_parameters, run_gpu_generate
from rollout_benchmarks.gpu_sync import run_gpu_sync
from rollout_benchmarks.group import OURS, run_group
from rollout_benchmarks.pause import Arrivals, run_pause
from rollout_benchmarks.results import BenchResult, write_result
from rollout_benchmarks.screen import Screen
from rollout_benchmarks.serve import TARGET, run_serve
from rollout_benchmarks.settings import (
    QUICK,
    BenchSettings,
    GenerateBench,
    GpuBench,
    GpuExpertsBench,
    GpuSyncBench,
    ModelShape,
)
from rollout_benchmarks.sync import run_sync
from rollout_benchmarks.workload import make_jobs, representative

RUNS = {
    "sync": lambda settings: run_sync(settings.sync, Screen()),
    "pause": lambda settings: run_pause(settings.pause, Screen()),
    "generate": lambda settings: run_generate(settings.generate, Screen()),
    "group": lambda settings: run_group(settings.group, Screen()),
}


@pytest.fixture(scope="module")
def settings() -> BenchSettings:
    return load_settings(BenchSettings, None, QUICK)


def written(result: BenchResult, folder: Path) -> dict[str, Any]:
    tiny = write_result(folder / "tiny.json", result.at_tiny_sizes())
    content = json.loads(tiny[0].read_text())
    assert not any(row["target"] or row["met"] is not None for row in content["headline"])
    assert "mark" not in labels(figure_of(content))
    path, picture = write_result(folder / "result.json", result)
    assert picture.read_bytes().startswith(b"\x89PNG")
    content: dict[str, Any] = json.loads(path.read_text())
    assert content["benchmark"] == result.benchmark
    assert content["config"]["settings"] and content["software"]["torch"]
    for row in content["headline"]:
        assert (
            row["measured"] and (row["floor"] or row["peer"]) and row["met"] in (True, False, None)
        )
    assert any(row["met"] is not None for row in content["headline"])
    assert "mark" in labels(figure_of(content))
    return content


def drawn(result: BenchResult, folder: Path) -> set[str]:
    """Write a result and its picture; the names of all bars."""
    path, picture = write_result(folder / "result.json", result)
    assert picture.read_bytes().startswith(b"\x89PNG")
    panels = figure_of(json.loads(path.read_text())).axes
    return {label.get_text() for ax in panels for label in ax.get_yticklabels()}


def labels(figure: Any) -> str:
    return " ".join(ax.get_xlabel() for ax in figure.axes)


def test_an_update_is_measured_in_plain_copies_of_the_same_bytes(
    settings: BenchSettings, tmp_path: Path
) -> None:
    numbers = written(RUNS["sync"](settings), tmp_path)["numbers"]
    large, small = numbers["large"], numbers["small"]
    assert large["num_tensors"] == 2 * 11 + 2
    assert small["num_tensors"] == settings.sync.num_small
    assert numbers["experts"]["num_tensors"] == 2 * (8 * 3 + 9) + 3
    assert numbers["experts"]["us_per_tensor"]["p50"] > 0
    for series in ("pack", "begin_to_committed", "begin_to_verified", "usual", "pause"):
        assert large["seconds"][series]["num"] == settings.sync.repetitions
        assert 0 < large["seconds"][series]["min"] <= large["seconds"][series]["p90"]
        assert large["plain_copies"][series]["p50"] > 0
    assert large["plain_copies"]["plain_copy"] == pytest.approx(
        {"num": 2, **dict.fromkeys(("min", "p10", "p50", "p90", "p99", "max", "mean"), 1.0)}
    )


def test_an_update_over_a_group_is_held_against_copies_and_loopback(
    settings: BenchSettings, tmp_path: Path
) -> None:
    numbers = written(RUNS["group"](settings), tmp_path)["numbers"]
    engine = numbers["engines"]["1"]
    seconds = engine["seconds"]
    assert engine["best_streams"] in settings.group.stream_counts
    assert set(engine["met"]) == set(OURS)
    for name in ("pack", *OURS, "each", "flat", "loopback", "plain_copy"):
        assert seconds[name]["num"] == settings.group.repetitions
        assert 0 < seconds[name]["min"] <= seconds[name]["p90"]
    for name in ("min", "p50", "max"):
        assert seconds["bound"][name] >= seconds["loopback"][name]
        assert seconds["bound"][name] >= 0.999 * 3 * seconds["plain_copy"][name]
    parts = sum(seconds[name]["mean"] for name in ("wire", "check_staged", "copy"))
    assert seconds["begin_to_committed"]["mean"] == pytest.approx(parts, rel=1e-3)
    for name, met in engine["met"].items():
        assert met == (engine["of_bound"][name]["p50"] <= 1)


def test_the_pause_is_what_a_client_waits_longer(settings: BenchSettings, tmp_path: Path) -> None:
    numbers = written(RUNS["pause"](settings), tmp_path)["numbers"]
    assert numbers["excess_s"]["num"] == settings.pause.syncs
    copy, step = numbers["plain_copy_s"]["p50"], numbers["decode_step_s"]["p50"]
    assert numbers["limit_s"] == pytest.approx(step + 1.5 * copy, rel=1e-4)
    assert len(numbers["series"]["updates"]) == settings.pause.syncs


def test_http_is_held_against_the_same_engine_in_process(settings: BenchSettings) -> None:
    result = run_serve(settings.serve, Screen())
    numbers = result.numbers
    assert numbers["output_tokens"] == 8 * 8
    for series in ("in_process_tokens_per_s", "http_tokens_per_s", "cost"):
        assert numbers[series]["num"] == settings.serve.rounds
    waits = numbers["waits_s"]
    assert waits["http, first token"]["num"] == waits["in process, first token"]["num"] == 8
    assert waits["http, next token"]["num"] == waits["in process, next token"]["num"] == 8 * 7
    assert result.headline[0].met == (numbers["cost"]["p50"] <= TARGET)


def test_gaps_are_those_between_tokens_that_touch_the_window() -> None:
    arrivals = Arrivals([[0.0, 1.0, 4.0, 5.0], [0.5, 2.5]])
    assert arrivals.worst(1.5, 2.0) == 3.0
    assert sorted(length for _, length in arrivals.gaps(1.5, 2.0)) == [2.0, 3.0]
    assert arrivals.worst(4.5, 9.0) == 1.0


def test_tokens_per_second_come_with_a_profile_that_adds_up(
    settings: BenchSettings, tmp_path: Path
) -> None:
    numbers = written(RUNS["generate"](settings), tmp_path)["numbers"]
    assert set(numbers["transformers"]) == {"4", "8"}
    best = numbers["transformers"][str(numbers["transformers_best_batch"])]
    assert best["tokens_per_s"] == max(p["tokens_per_s"] for p in numbers["transformers"].values())
    profile = numbers["profile"]
    spent = sum(phase["seconds"] for phase in profile["phases"].values())
    # Files have six significant digits.
    assert spent + profile["not_in_any_phase_s"] == pytest.approx(profile["seconds"], rel=1e-5)
    # Nearly all of it; less where others of the machine hold a step up between two phases.
    assert 0.5 < sum(phase["share"] for phase in profile["phases"].values()) <= 1
    jobs = make_jobs(settings.generate)
    assert numbers["output_tokens"] == sum(job.num_new for job in jobs)


def test_output_lengths_have_the_mean_that_was_asked_for() -> None:
    jobs = make_jobs(GenerateBench(prompts=200, samples=100, mean_new_tokens=50.0))
    lengths = [job.num_new for job in jobs]
    assert min(lengths) == 1 and sum(lengths) / len(lengths) == pytest.approx(50, rel=0.03)
    part = [job.num_new for job in representative(jobs, 50)]
    assert sum(part) / len(part) == pytest.approx(50, rel=0.05)


def test_a_benchmark_of_gpus_says_how_many_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="got 1 GPUs, expected 3"):
        run_gpu(GpuBench(tp_size=2), Screen())
    with pytest.raises(ConfigError, match=r"'pigeon'.*expected some of .'gloo', 'nccl'"):
        run_gpu(GpuBench(ways=("pigeon",)), Screen())
    with pytest.raises(ConfigError, match="got 1 GPUs, expected 2"):
        run_gpu(GpuBench(tp_size=2, ways=("peer_reads",)), Screen())


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 GPUs")
def test_an_update_between_gpus_is_measured_next_to_a_copy(
    settings: BenchSettings, tmp_path: Path
) -> None:
    result = run_gpu(settings.gpu, Screen())
    assert {"a copy from GPU to GPU", "peer reads", "gloo"} <= drawn(result, tmp_path)
    seconds = result.numbers["seconds"]
    assert set(seconds) == {"copy", *settings.gpu.ways}
    for way in settings.gpu.ways:
        assert seconds[way]["publish"]["p50"] > seconds[way]["pause"]["p50"] > 0
    assert len(result.headline) == len(settings.gpu.ways) + 1
    assert result.device.startswith("2 x ")


def test_parts_of_an_update_on_one_gpu_are_chosen_by_name() -> None:
    assert list(GpuSyncBench().models) == ["small", "large"]
    assert list(GpuSyncBench(only="large").models) == ["large"]
    assert list(GpuSyncBench(only="experts").models) == []
    with pytest.raises(ConfigError, match=r"gpu_sync.only: got 'huge', expected one of"):
        run_gpu_sync(GpuSyncBench(only="huge"), Screen())


@pytest.mark.gpu
def test_an_update_on_one_gpu_is_measured_next_to_its_floors(
    settings: BenchSettings, tmp_path: Path
) -> None:
    result = run_gpu_sync(settings.gpu_sync, Screen())
    assert {"begin to verified", "from the CPU: pack"} <= drawn(result, tmp_path)
    for name in ("small", "large"):
        seconds = result.numbers["models"][name]["seconds"]
        assert set(seconds) == {
            *("idle", "streaming, pause", "streaming, overlapped"),
            *("release and resume", "from the CPU"),
        }
        assert seconds["idle"]["publish"]["p50"] > seconds["idle"]["pause"]["p50"] > 0
    assert [row.met is None for row in result.headline] == [True, True, False]
    late = dataclasses.replace(settings.gpu_sync, only="small", budget_s=1e-6)
    assert run_gpu_sync(late, Screen()).numbers["models"]["small"]["seconds"].keys() == {"idle"}


def test_a_mixture_comes_with_the_floor_of_the_experts_it_touches(
    settings: BenchSettings, tmp_path: Path
) -> None:
    result = run_gpu_experts(settings.gpu_experts, Screen())
    numbers = result.numbers
    kernels = {20: {"us": {"all": 2.0}, "floor_us": {"all": 1.0}}}
    alone = dataclasses.replace(result, numbers={**numbers, "kernels": kernels})
    assert drawn(alone, tmp_path) == {"batch 1", "batch 4", "20 tokens"}
    alone = dataclasses.replace(result, numbers={**numbers, "kernels": {}})
    assert drawn(alone, tmp_path) == {"batch 1", "batch 4"}
    for batch, step in numbers["decode"].items():
        assert 0 < step["p50_ms"] and step["floor_ms"] > 0
        assert 2 - 1e-9 <= step["experts_per_layer"] <= min(8, 2 * batch) + 1e-9  # sums of floats
    assert numbers["prefill"]["tokens_per_s"] > 0
    counts = np.array([[4, 4, 0, 0], [2, 2, 2, 2]])
    assert experts_touched(counts, 2, 1) == pytest.approx(2)
    assert experts_touched(counts, 2, 100) == pytest.approx(3)
    whole = floor_bytes(GpuExpertsBench(), 0, 128)
    assert whole == pytest.approx(61e9 - 2 * 151_936 * 2048, rel=0.01)


def test_decode_prefill_and_the_rl_shape_come_with_floors(
    settings: BenchSettings, tmp_path: Path
) -> None:
    result = run_gpu_generate(settings.gpu_generate, Screen())
    assert {"batch 1", "batch 4", "prefill: prompts"} <= drawn(result, tmp_path)
    content = json.loads((tmp_path / "result.json").read_text())
    steps, rl = content["headline"]
    assert steps["what"].endswith("batch 1 / 4") and rl["measured"].endswith("tokens/s")
    for column in ("measured", "floor", "ratio"):
        assert steps[column].count(" / ") == 1
    numbers = content["numbers"]
    for step in numbers["decode"].values():
        assert 0 < step["p50_ms"] <= step["p99_ms"]
        assert step["floor_ms"] > 0 and step["steps"] > 0
    assert numbers["prefill"]["tokens_per_s"] > 0
    assert numbers["rl"]["output_tokens"] >= 8
    assert num_parameters(ModelShape()) == pytest.approx(0.596e9, rel=0.01)
