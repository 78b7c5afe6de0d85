"""kill -9 of one rank of an engine of two, whose trainer's bytes are on a GPU: the course of the CPU's matrix.

Ranks and trainers are processes that begin anew, because one that was forked cannot be trusted with CUDA. Rank r is on
GPU r, the trainer on the first one: rank 0 reads its arena where it is, rank 1 over the link. Over NCCL, which takes no
two members on one GPU, the trainer is on the third.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engine_deaths import NEXT, rank_dies
from engine_faults import (
    GREEDY,
    HERE,
    PROMPT_SETS,
    Actor,
    FaultyEngine,
    is_alive,
    kill_all,
)
from fault_matrix import Case
from versions import version_weights

import weight_sync
from rollout.cli.tiny import save_tiny_checkpoint

NUM_RANKS = 2
STAND_IN = (
    f"sys.path.insert(0, {str(HERE.parent / 'sync')!r})\n"
    "from ipc_stand_in import PlainPatch, stand_in_for_ranks; stand_in_for_ranks(PlainPatch())"
)
"""What a rank does first where there is no GPU."""


class EngineOfTwo(FaultyEngine):
    """`FaultyEngine` with a rank on each of two GPUs."""

    def __init__(self, folder: Path, points: Path, device: str) -> None:
        super().__init__(
            folder,
            points,
            None,  # type: ignore[arg-type]
            None,
            more=STAND_IN if device == "cpu" else "",
            tp_size=NUM_RANKS,
            device=device,
            kv_cache_bytes=4 << 20,
            disable_cuda_graph=True,
            request_timeout_s=60.0,
        )

    def serves(self, number: int) -> None:
        """This version, whole, on all ranks."""
        expected = weight_sync.fingerprint(version_weights(self.folder, number))
        assert self.engine.weights_fingerprint() == expected
        assert self.engine.status().torn is None
        for result in self.engine.generate(input_ids=PROMPT_SETS, sampling_params=GREEDY):
            assert len(result["output_ids"]) == GREEDY["max_new_tokens"]

    def close(self) -> None:
        """Shut down; no process of it and no socket survives."""
        sockets = Path(self.engine._executor._sockets)  # type: ignore[attr-defined]
        super().close()
        assert not sockets.exists(), "a socket is left"


class Trainers:
    """What makes trainers for `rank_dies`: processes that begin anew, and have a version for another engine later."""

    def __init__(self, folder: Path, device: str) -> None:
        self._folder, self._device = folder, device
        self.next_address = folder / "address"
        self.processes: list[subprocess.Popen[bytes]] = []
        self.made: list[Actor] = []

    def trainer(self, address: str, folder: Path, number: int, *, transport: str) -> Actor:
        """As `Nursery.trainer`."""
        report = self._folder / f"trainer-{len(self.made)}.jsonl"
        update = {"address": address, "folder": str(folder), "number": number, "commits": True}
        update |= {"transport": transport, "halfway": False, "options": {}}
        update |= {"device": self._device, "then_to": str(self.next_address)}
        request = {"role": "trainer", "report": str(report), "options": update}
        command = [sys.executable, str(HERE / "engine_nursery.py"), json.dumps(request)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.processes.append(subprocess.Popen(command, env=environment))
        self.made.append(Actor(report))
        self.made[-1].goes_on = True
        return self.made[-1]

    def close(self) -> None:
        """End them."""
        for process in self.processes:
            process.kill()
            process.wait(30)


@contextmanager
def engine_of_two(folder: Path, points: Path, device: str) -> Iterator[EngineOfTwo]:
    """One that is gone afterwards, whatever happens to it meanwhile."""
    engine = EngineOfTwo(folder, points, device)
    pids = engine.pids
    try:
        yield engine
    except BaseException:
        kill_all(pids)
        engine.engine.shutdown()
        raise
    engine.close()


def kill_rank(rank: int, phase: str, transport: str, device: str) -> float:
    """Kill one of two ranks in a phase of an update; then a new engine takes the same trainer's next version.

    Seconds until nobody waited any more for the engine that is gone.
    """
    case = Case(
        who=f"rank {rank} killed", phase=phase, transport=transport, engine="local, 2 ranks"
    )
    place = device
    if device == "cuda":
        place = f"cuda:{NUM_RANKS if transport == 'process_group' else 0}"
    with tempfile.TemporaryDirectory(prefix="gpu-faults-") as name:
        model, here = Path(name) / "model", Path(name)
        save_tiny_checkpoint(model, "qwen2", tie_word_embeddings=True)
        trainers = Trainers(here, place)
        try:
            with engine_of_two(model, here / "points", device) as engine:
                outcome = rank_dies(case, engine, trainers, here)  # type: ignore[arg-type]
            [trainer] = trainers.made
            assert is_alive(trainer.pid), "the trainer is to live"
            with engine_of_two(model, here / "more points", device) as engine:
                trainers.next_address.write_text(f"{engine.address}\n")
                said = trainer.says(number=2)
                assert said["left"] == [[], []], said
                engine.serves(NEXT)
                trainer.kill()
                engine.holds_no_arena()
                engine.serves(NEXT)
        finally:
            trainers.close()
    return outcome.seconds
