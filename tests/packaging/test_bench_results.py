"""A benchmark's result file has what the README's table and a careful reader need."""

import dataclasses
import importlib.util
import io
import json

import pytest
from rich.console import Console

from rollout_benchmarks.figures import DRAWN, figure_of
from rollout_benchmarks.machine import measure_copy
from rollout_benchmarks.results import BenchResult, Headline, show, summary, write_result
from rollout_benchmarks.screen import Screen


@pytest.fixture
def readme_table(checkout):
    path = checkout / "benchmarks" / "readme_table.py"
    spec = importlib.util.spec_from_file_location("readme_table", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_percentiles_are_values_that_occurred():
    got = summary([float(value) for value in range(100, 0, -1)])
    assert (got["min"], got["p90"], got["p99"], got["max"]) == (1.0, 90.0, 99.0, 100.0)
    assert (got["num"], got["p50"], got["mean"]) == (100, 50.5, 50.5)
    assert set(summary([2.0]).values()) == {1, 2.0}
    with pytest.raises(ValueError, match="no values"):
        summary([])


def test_a_measured_copy_says_where_and_with_what(tmp_path):
    result = measure_copy(num_bytes=1 << 16, repeats=3)
    write_result(tmp_path / "new" / "machine.json", result)
    data = json.loads((tmp_path / "new" / "machine.json").read_text())
    assert data["config"]["num_bytes"] == 1 << 16
    assert data["numbers"]["copy_s"]["num"] == 3
    assert "CPUs" in data["device"]
    assert data["commit"]


def test_the_table_has_a_row_per_headline_and_names_its_sources(tmp_path, readme_table):
    result = measure_copy(num_bytes=1 << 12, repeats=1)
    write_result(tmp_path / "machine.json", result)
    (row,) = result.headline
    assert isinstance(row, Headline)
    readme = f"before {readme_table.BEGIN} old {readme_table.END} after"
    new = readme_table.rewritten(readme, readme_table.read_results(tmp_path))
    cells = [cell for cell in (row.what, row.measured, row.floor, row.ratio) if cell]
    assert f"| {' | '.join(cells)} |" in new
    assert "`machine` at " in new
    assert new.startswith("before ")
    assert new.endswith(" after")
    assert " old " not in new


ROWS = (
    Headline(what="a", measured="3 ms", floor="1 ms", ratio="3", target="at most 2", met=False),
    Headline(what="b", measured="1 ms", target="at most 2 ms", met=True, peer="9 ms (usual)"),
    Headline(what="c", measured="5 ms", floor="4 ms", ratio="1.25"),
)


def test_floors_targets_and_peers_have_columns_and_what_is_missed_is_marked(readme_table):
    result = {
        "benchmark": "toy",
        "device": "cpu",
        "commit": "0123456789abcdef-dirty",
        "headline": [dataclasses.asdict(row) for row in ROWS],
    }
    lines = readme_table.tables([result]).splitlines()
    assert lines[2] == "| what | measured | floor | of the floor | target | usual way |"
    assert lines[4] == "| a | 3 ms | 1 ms | 3 | **at most 2: missed** |  |"
    assert lines[5] == "| b | 1 ms |  |  | at most 2 ms | 9 ms (usual) |"
    assert lines[6] == "| c | 5 ms | 4 ms | 1.25 |  |  |"
    assert lines[-1] == "Measured on cpu: `toy` at 0123456789-dirty."


def test_each_device_has_a_table_of_the_columns_that_it_fills(tmp_path, readme_table):
    devices = ("AMD EPYC, 2 CPUs", "2 x NVIDIA H200", "NVIDIA H200", "2 x NVIDIA H200")
    for name, device, row in zip("abcd", devices, (*ROWS, ROWS[1]), strict=True):
        content = {"benchmark": name, "device": device, "commit": "0" * 40}
        content["headline"] = [dataclasses.asdict(row)]
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    text = readme_table.tables(readme_table.read_results(tmp_path))
    one, two, cores = text.split("### ")[1:]
    assert one.splitlines()[0] == "One H200" and two.splitlines()[0] == "Two H200s"
    assert cores.splitlines()[0] == "Two CPU cores, AMD EPYC"
    assert one.splitlines()[2:4] == [
        "| what | measured | floor | of the floor |",
        "|---|--:|--:|--:|",
    ]
    assert two.splitlines()[2] == "| what | measured | target | usual way |"
    assert two.count("\n| b |") == 2
    assert "| **at most 2: missed** |" in cores


def test_each_result_that_can_be_drawn_has_its_picture_which_says_what_was_missed(checkout):
    results = sorted((checkout / "benchmarks" / "results").glob("*.json"))
    for path in results:
        content = json.loads(path.read_text())
        picture = path.with_suffix(".png")
        assert picture.exists() == (content["benchmark"] in DRAWN), path.name
        if picture.exists():
            assert picture.read_bytes().startswith(b"\x89PNG")
            assert picture.stat().st_size < 100_000
            missed = any(row["met"] is False for row in content["headline"])
            assert ("missed" in words(figure_of(content))) == missed, path.name
    assert {path.stem.partition("-")[0] for path in results} >= {"gpu", "sync"}


def test_models_and_experts_of_one_result_have_panels_of_their_own(checkout):
    folder = checkout / "benchmarks" / "results"
    large, experts = (
        json.loads((folder / f"gpu-sync-{name}-nvidia-h200.json").read_text())
        for name in ("large", "experts")
    )
    models = large["numbers"]["models"]
    short = {**models["large"], "seconds": {"idle": models["large"]["seconds"]["idle"]}}
    large["numbers"] |= {"models": {"small": short, **models}} | {
        "experts": experts["numbers"]["experts"]
    }
    figure = figure_of(large)
    assert [ax.get_title(loc="left").partition(" ")[0] for ax in figure.axes] == [
        *("Update", "Update", "Trainer", "Update")
    ]
    assert all(ax.get_xlim()[0] == 0 for ax in figure.axes)


def words(figure):
    return " ".join(text.get_text() for ax in figure.axes for text in ax.texts)


def shown(result):
    console = Console(record=True, width=200, file=io.StringIO())
    show(result, Screen(console))
    return console.export_text()


def test_the_screen_says_which_targets_were_missed_and_tiny_sizes_have_none():
    result = BenchResult(benchmark="toy", config={}, numbers={}, headline=ROWS)
    text = shown(result)
    assert "at most 2: missed" in text and "at most 2 ms: met" in text
    assert "targets: 1 of 2 met; missed: a (at most 2)" in text
    text = shown(result.at_tiny_sizes())
    assert "at most" not in text and "missed" not in text and "9 ms (usual)" in text
    assert "held against no target" in text
    assert "target" not in shown(dataclasses.replace(result, headline=ROWS[2:]))


def test_a_file_that_lacks_something_is_named(tmp_path, readme_table):
    (tmp_path / "half.json").write_text('{"benchmark": "sync", "device": "cpu"}')
    with pytest.raises(SystemExit, match=r"half\.json: lacks commit, headline"):
        readme_table.read_results(tmp_path)
