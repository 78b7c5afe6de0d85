"""`docs/faults.md` is about the cases that are tested, all of them and no others."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path
from typing import Any

import fault_matrix
import pytest
from fault_matrix import CASES, DEATHS, SECTIONS, Case

HERE = Path(__file__).parent
DOCS = HERE.parent.parent / "docs"


@pytest.fixture(scope="module")
def writer() -> Any:
    """`docs/write_faults.py`."""
    spec = importlib.util.spec_from_file_location("write_faults", DOCS / "write_faults.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_committed_table_has_an_entry_for_every_case(writer: Any) -> None:
    found = writer.documented((DOCS / "faults.md").read_text())
    assert len(found) == len(set(found))
    assert set(found) == set(CASES), "run `make faults`"


def test_what_the_committed_table_says_besides_is_what_would_be_written(writer: Any) -> None:
    text = (DOCS / "faults.md").read_text()
    rows: dict[Case, Any] = {case: {"result": "ends", "seconds": 0.1} for case in CASES}
    prose = [line for line in writer.document(rows).splitlines() if not line.startswith("|")]
    assert [line for line in text.splitlines() if not line.startswith("|")] == prose


def test_what_is_written_is_what_is_read(writer: Any) -> None:
    rows: dict[Case, Any] = {case: {"result": "ends", "seconds": 0.1} for case in CASES}
    text = writer.document(rows)
    assert set(writer.documented(text)) == set(CASES)
    assert len(writer.documented(text.replace("ends: 0.1", "·", 1))) == len(CASES) - 1


def test_no_case_is_listed_twice_and_every_death_has_a_table() -> None:
    assert len(set(CASES)) == len(CASES)
    executors = [executor for _, _, chosen in SECTIONS for executor in chosen]
    assert len(set(executors)) == len(executors)
    assert {case.executor for case in DEATHS} == set(executors)


def test_every_part_of_the_matrix_is_somebodys_parameters() -> None:
    used: set[str] = set()
    for path in HERE.glob("test_*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and getattr(call.func, "attr", "") == "parametrize":
                used.update(arg.id for arg in call.args if isinstance(arg, ast.Name))
    wholes = ("DEATHS", "ALL_LIES", "CASES")
    parts = {
        name
        for name, value in vars(fault_matrix).items()
        if isinstance(value, tuple) and value and isinstance(value[0], Case) and name not in wholes
    }
    assert parts <= used and sum(len(getattr(fault_matrix, name)) for name in parts) == len(CASES)
