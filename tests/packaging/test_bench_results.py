"""A benchmark's result file has what the README's table and a careful reader need."""

import importlib.util
import json

import pytest

from rollout_benchmarks.machine import measure_copy
from rollout_benchmarks.results import Headline, summary, write_result


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
    assert f"| {row.what} | {row.measured} | {row.floor} | {row.ratio} |" in new
    assert "`machine` at " in new
    assert new.startswith("before ")
    assert new.endswith(" after")
    assert " old " not in new


def test_a_file_that_lacks_something_is_named(tmp_path, readme_table):
    (tmp_path / "half.json").write_text('{"benchmark": "sync", "device": "cpu"}')
    with pytest.raises(SystemExit, match=r"half\.json: lacks commit, headline"):
        readme_table.read_results(tmp_path)
