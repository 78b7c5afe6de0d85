"""The compiler takes every kernel for a Hopper GPU, and a multiprocessor has room for its programs; needs no GPU.

Tensors are imagined, and triton is told of a device that is not there: in a process of its own (`compiled_kernels`).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
KERNELS = HERE.parent.parent / "kernels"
MOST_SHARED_BYTES = 227 * 1024
"""Of a program, on Hopper."""
MOST_REGISTERS = 65_536
"""Of a multiprocessor, 32 threads to a warp."""
FEW = (
    "decode of 64 (16, 8, 128) bfloat16 window=None exact=False",
    "decode of 1 (14, 2, 64) bfloat16 window=1024 exact=True",
    "prefill (16, 8, 128) bfloat16 window=None exact=False",
    "shared prefixes of 8 (16, 8, 128) bfloat16 window=None exact=True",
    *("experts of 1024 bfloat16", "router bfloat16", "float32 router", "copies", "few rows"),
    *("draws 320 float32 edits=True filters=True", "draws 1 float32 edits=False filters=True"),
    *("log-probabilities 320 bfloat16", "norms bfloat16", "rotation bfloat16"),
    *("gates bfloat16", "products bfloat16"),
)
"""Of the calls, which take ten minutes all together: every kernel."""


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    pytest.importorskip("triton")
    if sys.platform != "linux":
        pytest.skip("triton is for Linux")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(HERE / "compiled_kernels.py"), "--json", *FEW],
        env={**environment, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=840,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return rows


@pytest.mark.slow
def test_every_kernel_is_taken_by_the_compiler(compiled: list[dict[str, Any]]) -> None:
    launched = re.compile(r"^ *def (\w+_kernel)\(", re.MULTILINE)
    there = {name for path in KERNELS.glob("*.py") for name in launched.findall(path.read_text())}
    assert {row["kernel"] for row in compiled} == there


@pytest.mark.slow
def test_programs_fit_a_multiprocessor(compiled: list[dict[str, Any]]) -> None:
    for row in compiled:
        assert row["shared_bytes"] <= MOST_SHARED_BYTES, row
        assert row["registers"] * 32 * row["warps"] <= MOST_REGISTERS, row


@pytest.mark.slow
def test_what_a_write_reads_back_is_not_what_it_has_just_read(
    compiled: list[dict[str, Any]],
) -> None:
    """In the interpreter both are the same bytes."""
    read_back = [row["reads_shared_cache"] for row in compiled if row["kernel"] == "words_kernel"]
    assert sum(read_back) == 2 and len(read_back) > 4  # for each alignment, where it sums
