"""The cells of `docs/faults_gpu.md`: on a GPU where there is one, else over what stands in for its memory."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "sync"))

import gpu_faults
from ipc_stand_in import stand_in


@pytest.mark.gpu
@pytest.mark.parametrize("cell", gpu_faults.CELLS, ids=str)
def test_on_a_gpu(cell: gpu_faults.Cell) -> None:
    gpu_faults.run_cell(cell, "cuda")


FEW = [
    cell
    for cell in gpu_faults.CELLS
    if cell.transport == "cuda_ipc" and cell.phase not in ("begin", "stage")
]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the cells run on the GPU itself")
@pytest.mark.parametrize("cell", FEW, ids=str)
def test_over_memory_files(cell: gpu_faults.Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)
    gpu_faults.run_cell(cell, "cpu")
