"""`docs/faults.md` is about the cases that are tested, all of them and no others."""

from __future__ import annotations

import ast
from pathlib import Path

import fault_matrix
from fault_matrix import CASES

HERE = Path(__file__).parent
TABLE = HERE.parent.parent / "docs" / "faults.md"


def test_the_committed_table_has_a_passed_row_for_every_case() -> None:
    rows = []
    for line in TABLE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 7 and cells[-1] == "pass":
            rows.append((*cells[:3], int(cells[3])))
    expected = [(case.who, case.phase, case.transport, case.tp_size) for case in CASES]
    assert rows == expected, "run `make faults`"


def test_no_case_is_listed_twice() -> None:
    assert len(set(CASES)) == len(CASES)


def test_every_part_of_the_matrix_is_somebodys_parameters() -> None:
    used: set[str] = set()
    for path in HERE.glob("test_engine_*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and getattr(call.func, "attr", "") == "parametrize":
                used.update(arg.id for arg in call.args if isinstance(arg, ast.Name))
    parts = {
        name
        for name, value in vars(fault_matrix).items()
        if isinstance(value, tuple) and name not in ("CASES", "PHASES")
    }
    assert parts <= used and sum(len(getattr(fault_matrix, name)) for name in parts) == len(CASES)
