"""Fingerprints of what a write has put into the parameters, read back behind it: in triton's interpreter, in a process
of its own (this file, as a script), and on a GPU through a publisher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from interpreted import told_by
from sync_support import ToyEngine, toy_map, toy_shapes, weights

import weight_sync
from weight_sync import TornWeightsError, WeightPublisher
from weight_sync.layout.fingerprints import ArenaFingerprints
from weight_sync.layout.manifest import Manifest
from weight_sync.plan.plan import compile_plan
from weight_sync.plan.read_back import ReadBackCopies
from weight_sync.staging.stage import ArenaStage, Written


def test_what_is_written_is_what_is_read_back() -> None:
    """All tensors are but an empty one, and one whose parameter is strided."""
    expected = {"rows": str(len(toy_shapes()) - 2), "fits": "True"}
    assert told_by(__file__) == expected | {"read_back": "True", "written": "True"}


def test_what_the_write_read_back_is_what_is_compared(
    make_engine: Callable[..., ToyEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    with WeightPublisher(engine, timeout_s=20) as publisher:
        publisher.publish(weights(1.0))
        write = ArenaStage.write
        wrong: list[int] = []

        def reads_back(self: ArenaStage, rows: Any, *, read_back: bool = False) -> Written | None:
            write(self, rows)

            def values() -> np.ndarray:
                found = self.plan.resident_fingerprints(rows).numpy().view(np.uint64).copy()
                found[wrong] ^= 1
                return found

            return values if read_back else None

        monkeypatch.setattr(ArenaStage, "write", reads_back)
        for value in (2.0, 3.0):
            report = publisher.publish(
                weights(value), verify="pause" if value == 2.0 else "overlapped"
            )
            assert report.fingerprint == weight_sync.fingerprint(weights(value))
        wrong.append(2)
        with pytest.raises(TornWeightsError, match="resident bytes of 1 tensors"):
            publisher.publish(weights(4.0))
        publisher.publish(weights(5.0), verify="overlapped")  # that reads for itself
        assert engine.values() == {5.0} and engine.receiver.torn is None


@pytest.mark.gpu
def test_on_a_gpu_damage_between_write_and_check_is_seen(
    make_engine: Callable[..., ToyEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The arena is damaged behind the vote: what was written is not what was declared."""
    engine = make_engine(device="cuda:0")
    with WeightPublisher(engine, timeout_s=20) as publisher:
        publisher.publish(weights(1.0, device="cuda:0"))
        plan = engine.receiver._plans.canonical.plan
        assert plan._read_back is not None and len(plan._read_back.rows) >= 6
        write = ArenaStage.write

        def damaged(self: ArenaStage, rows: Any, *, read_back: bool = False) -> Written | None:
            self._buffer[self.plan.manifest.offsets[3]] ^= 1
            return write(self, rows, read_back=read_back)

        with monkeypatch.context() as patch:
            patch.setattr(ArenaStage, "write", damaged)
            with pytest.raises(TornWeightsError, match="resident bytes of 1 tensors"):
                publisher.publish(weights(2.0, device="cuda:0"))
        report = publisher.publish(weights(3.0, device="cuda:0"))
        assert report.fingerprint == weight_sync.fingerprint(weights(3.0))
        assert engine.values() == {3.0} and engine.receiver.torn is None


def aligned(num_bytes: int) -> torch.Tensor:
    spare = torch.zeros(num_bytes + 256, dtype=torch.uint8)
    return spare[-spare.data_ptr() % 256 :][:num_bytes]


def main() -> None:
    known = toy_map()
    manifest = Manifest(tensors=known.metas(), bucket_bytes=1 << 20)
    plan = compile_plan(manifest, known)
    arena = aligned(manifest.arena_bytes)
    arena.random_(generator=torch.Generator().manual_seed(1))
    copies = ReadBackCopies(manifest, arena, plan.copies)
    print(f"rows={len(copies.rows)}")
    print(f"fits={copies.fits(arena)}")
    found = copies.run(arena)
    resident = plan.resident_fingerprints()
    print(f"read_back={torch.equal(found, resident[torch.from_numpy(copies.rows)])}")
    print(f"written={torch.equal(resident, ArenaFingerprints(manifest).values(arena))}")


if __name__ == "__main__":
    main()
