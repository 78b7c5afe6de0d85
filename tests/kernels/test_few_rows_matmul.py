"""Products of a few rows: right in the interpreter and on a GPU, and used where a measurement is stored alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from interpreted import Checks, poisoned, relative_error, search_interpreted

from rollout.layers import few_rows
from rollout.layers.linear import project
from rollout_kernels import few_rows_matmul as kernels
from rollout_kernels.expert_configs import TileConfig
from rollout_kernels.few_rows_matmul import few_rows_config, few_rows_linear

CHECKS = Checks()
TOLERANCE = {torch.float32: 1e-6, torch.float16: 8e-4, torch.bfloat16: 6e-3}
NARROW = TileConfig(columns=16, depth=32, warps=1, stages=2)
WIDE = TileConfig(columns=64, depth=128, warps=4, stages=3)


def dtypes(device: torch.device) -> tuple[torch.dtype, ...]:
    """bfloat16 products are wrong in the interpreter."""
    return tuple(TOLERANCE) if device.type == "cuda" else (torch.float32, torch.float16)


def operands(
    rows: int, columns: int, depth: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows * 7 + columns)
    shapes = ((rows, depth), (columns, depth), (columns,))
    x, weight, bias = (
        torch.randn(shape, generator=generator).to(dtype).to(device) for shape in shapes
    )
    return x, weight / depth**0.5, bias


@CHECKS.add(
    {"rows": 1, "columns": 1, "depth": 1},
    {"rows": 1, "columns": 128, "depth": 256},
    {"rows": 5, "columns": 70, "depth": 200},
    {"rows": 8, "columns": 64, "depth": 128},
    {"rows": 9, "columns": 100, "depth": 384},
    {"rows": 16, "columns": 192, "depth": 100},
)
def products(device: torch.device, rows: int, columns: int, depth: int) -> None:
    for dtype in dtypes(device):
        x, weight, bias = operands(rows, columns, depth, dtype, device)
        for config in (NARROW, WIDE):
            for given in (None, bias):
                out = poisoned((rows, columns), dtype, device)
                assert few_rows_linear(x, weight, given, out, config) is out
                want = kernels.reference(x, weight, given)
                assert relative_error(out, want) < TOLERANCE[dtype]


@CHECKS.add()
def rows_may_be_strided(device: torch.device) -> None:
    x, weight, bias = operands(4, 33, 64, torch.float16, device)
    wide = torch.full((4, 100), float("nan"), device=device, dtype=torch.float16)
    wide[:, 10:74] = x
    out = poisoned((4, 80), torch.float16, device)
    few_rows_linear(wide[:, 10:74], weight, bias, out[:, 5:38], NARROW)
    assert torch.equal(out[:, 5:38], few_rows_linear(x, weight, bias, None, NARROW))
    assert out[:, :5].isnan().all() and out[:, 38:].isnan().all()


verdicts, test_interpreted, test_on_gpu = CHECKS.as_tests(__file__)


@pytest.fixture
def entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file with entries for 32 x 64, in the place of the stored one."""
    file = tmp_path / "few_rows_configs.json"
    shape = {"outputs": 32, "inputs": 64}
    listed = [
        {**shape, "max_rows": 1, "launch": asdict(NARROW)},
        {**shape, "max_rows": 4, "launch": None},
        {**shape, "max_rows": 8, "launch": asdict(WIDE)},
    ]
    file.write_text(json.dumps({"default": listed}))
    monkeypatch.setattr(kernels, "FILE", file)
    kernels._entries.cache_clear()
    yield file
    kernels._entries.cache_clear()


def test_a_product_takes_the_launch_that_is_stored_for_its_shape_and_rows(entries: Path) -> None:
    weight = torch.empty(32, 64, dtype=torch.bfloat16)
    found = [few_rows_config(torch.empty(m, 64), weight) for m in (0, 1, 2, 4, 5, 8, 9, 17)]
    assert found == [None, NARROW, None, None, WIDE, WIDE, None, None]
    assert few_rows_config(torch.empty(1, 64), weight.float()) is None
    assert few_rows_config(torch.empty(1, 32), torch.empty(64, 32, dtype=torch.float16)) is None


def test_layers_multiply_with_it_and_else_as_before(
    entries: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[TileConfig] = []

    def noted(x: Any, weight: Any, bias: Any, out: Any, config: TileConfig) -> torch.Tensor:
        taken.append(config)
        return project(x, weight, bias, out)

    monkeypatch.setattr(few_rows, "few_rows_linear", noted)
    x, weight, bias = operands(20, 32, 64, torch.bfloat16, torch.device("cpu"))
    for rows in (1, 4, 8, 20):
        assert torch.equal(
            few_rows.project_few(x[:rows], weight, bias), project(x[:rows], weight, bias)
        )
    assert taken == [NARROW, WIDE]


def test_the_command_can_be_tried_without_a_gpu(tmp_path: Path) -> None:
    code = "from rollout_benchmarks.command import app; app()"
    out = tmp_path / "found.json"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", code, *"gpu few-rows --tiny --out".split(), str(out)]
    subprocess.run(command, env=environment, check=True, timeout=240)
    assert all(row["us"] > 0 for row in json.loads(out.read_text())["rows"])


def test_the_search_stores_what_it_has_measured(tmp_path: Path) -> None:
    from rollout_benchmarks.expert_kernels import stored
    from rollout_benchmarks.few_rows import merged

    file, out = tmp_path / "few_rows_configs.json", tmp_path / "found.json"
    found = search_interpreted("few_rows", out)
    assert [entry["max_rows"] for entry in found["entries"]] == [1, 2, 4, 8, 16]
    assert all(len(row["tries"]) == 2 and row["us"] > 0 for row in found["rows"])
    other = {"outputs": 8, "inputs": 96, "max_rows": 4, "launch": None}
    assert merged([other, *found["entries"]], found["entries"]) == [other, *found["entries"]]
    file.write_text("{}")
    stored(file, "cpu", found["entries"])
    assert json.loads(file.read_text()) == {"cpu": found["entries"]}


if __name__ == "__main__":
    CHECKS.main()
