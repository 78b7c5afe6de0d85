"""A benchmark's result file has what the README's table and a careful reader need."""

import dataclasses
import importlib.util
import io
import json

import pytest
from rich.console import Console

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
    assert f"| {row.what} | {row.measured} | {row.floor} | {row.ratio} |  |  |" in new
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
    lines = readme_table.table([result]).splitlines()
    assert lines[0] == "| what | measured | floor | of the floor | target | usual way |"
    assert lines[2] == "| a | 3 ms | 1 ms | 3 | **at most 2: missed** |  |"
    assert lines[3] == "| b | 1 ms |  |  | at most 2 ms | 9 ms (usual) |"
    assert lines[4] == "| c | 5 ms | 4 ms | 1.25 |  |  |"
    assert lines[-1] == "Measured: `toy` at 0123456789-dirty on cpu."


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
