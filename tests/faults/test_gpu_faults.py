"""The cells of `docs/faults_gpu.md`: on GPUs where there are any, else over what stands in for their memory."""

from __future__ import annotations

import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "sync"))

import gpu_faults
from engine_process import state_of
from gpu_fault_cells import CELLS, Cell, document
from ipc_stand_in import stand_in
from sync_support import ToyEngine


@pytest.mark.gpu
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_on_a_gpu(cell: Cell) -> None:
    if cell.num_gpus > torch.cuda.device_count():
        pytest.skip(f"needs {cell.num_gpus} GPUs")
    gpu_faults.run_cell(cell, "cuda")


FEW = [
    cell
    for cell in CELLS
    if (cell.transport == "cuda_ipc" and cell.phase not in ("begin", "stage"))
    or "late" in cell.who
    or str(cell) == "kill -9 of rank 1 of two, stage, peer_reads"
]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the cells run on the GPU itself")
@pytest.mark.parametrize("cell", FEW, ids=str)
def test_over_memory_files(cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)
    gpu_faults.run_cell(cell, "cpu")


def test_an_engine_is_looked_at_between_steps_and_not_while_an_update_is_written() -> None:
    engine = ToyEngine()
    half, go_on = threading.Event(), threading.Event()

    def write() -> None:
        first, *others = engine.weight_map.parameters.values()
        first.data.fill_(2.0)
        half.set()
        go_on.wait(0.3)
        for parameter in others:
            parameter.data.fill_(2.0)

    with ThreadPoolExecutor(1) as pool:
        written = pool.submit(engine.host.between_steps, write, 30.0)
        assert half.wait(30)
        assert len(engine.values()) == 2
        state = state_of(engine)
        assert state["values"] == [2.0] and state["mixtures"] == []
        written.result(30)
    engine.close()


@pytest.mark.parametrize("num_gpus", [1, 2, 3])
def test_the_table_counts_its_cells_and_says_what_was_left_out(num_gpus: int) -> None:
    run = [cell for cell in CELLS if cell.num_gpus <= num_gpus]
    rows = {str(cell): "0.10" for cell in run} | {str(run[0]): "failed: AssertionError"}
    text = document(rows, "a device")
    assert f"{len(run)} cells, {len(run) - 1} of them as they should be" in text
    entries = [entry.strip() for line in text.splitlines() for entry in line.split("|")]
    assert entries.count("0.10") == len(run) - 1 and entries.count("failed: AssertionError") == 1
    assert entries.count("–") == len(CELLS) - len(run)
    for more in (2, 3):
        needed = f"{sum(cell.num_gpus == more for cell in CELLS)} that need {more} GPUs"
        assert (needed in text) == (more > num_gpus)
