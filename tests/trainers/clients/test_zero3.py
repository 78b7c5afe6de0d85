"""TRL with deepspeed's ZeRO-3, two ranks on a CPU over gloo: what is partitioned is gathered and published."""

from __future__ import annotations

from pathlib import Path

import pytest
from trl_support import run_ranks, write_checkpoint

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sorting")
    write_checkpoint(folder)
    return folder


@pytest.mark.timeout(600)
@pytest.mark.parametrize("mode", ["zero3", "zero3-adapters"])
def test_partitioned_ranks_train_on_what_was_published(
    checkpoint: Path, tmp_path: Path, mode: str
) -> None:
    """The engine holds noise before the first update; rank 0 has it, and each rank a part of every parameter."""
    said = run_ranks(checkpoint, tmp_path, mode)
    for row in said:
        assert row["is_sharded"] and row["label"] == "step 2"
        assert len(row["differences"]) == 3 and max(row["differences"]) < TOLERANCE
        if mode == "zero3":  # else what is served has adapters merged, and what is held has not
            assert row["served"] == row["expected"]
    assert said[0]["served"] == said[1]["served"]
    assert [row["publishes"] for row in said] == [True, False]
    held = [row["held"] for row in said]
    assert max(held) < 0.6 * said[0]["all"] < sum(held)
