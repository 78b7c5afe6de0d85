"""Who dies or lies in which phase of an update whose bytes are on a GPU: every cell, and the table of what happened.

    python tests/faults/gpu_faults.py [PATH]    runs all cells on this machine's GPUs; writes PATH or docs/faults_gpu.md

Engine and trainer are real processes with tensors on the GPU, or on two GPUs where there are two ("peer_reads"); the
model is a toy, since what is tested is the way of the bytes. With `device="cpu"` the same cells run over what stands in
for a GPU's memory.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
SYNC = HERE.parent / "sync"
TABLE = HERE.parent.parent / "docs" / "faults_gpu.md"
sys.path.insert(0, str(SYNC))

from sync_support import collect, eventually, kill, read_line, spawn, weights  # noqa: E402

from weight_sync import WeightPublisher  # noqa: E402
from weight_sync.errors import (  # noqa: E402
    EngineDiedError,
    FingerprintMismatch,
    ManifestMismatch,
    SessionBusy,
    SyncError,
)

TRANSPORTS = (
    *("cuda_ipc", "shared_memory"),
    *(("peer_reads",) if torch.cuda.device_count() > 1 else ()),
)
"""Peer reads: CUDA IPC, from the trainer's GPU to the engine's."""
PHASES = ("begin", "stage", "vote", "commit")
PROMPTLY_S = 3.0


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One fault."""

    who: str
    """What goes wrong."""
    phase: str
    """When."""
    transport: str
    """How the bytes go."""

    def __str__(self) -> str:
        return f"{self.who}, {self.phase}, {self.transport}"


CELLS = [
    *(
        Cell(who=f"kill -9 of the {who}", phase=phase, transport=transport)
        for who in ("trainer", "engine")
        for phase in PHASES
        for transport in TRANSPORTS
    ),
    *(
        Cell(who=who, phase=phase, transport=transport)
        for who, phase in (
            ("a byte of the arena changes", "after it was announced"),
            ("unknown, misshapen and missing tensors", "before the session"),
            ("a second trainer", "in another's session"),
            ("the trainer leaves", "with a session open"),
        )
        for transport in TRANSPORTS
    ),
]


class Far:
    """An engine in another process."""

    def __init__(self, device: str) -> None:
        self.process = spawn("engine_process.py", "-", device)
        self.address = read_line(self.process)

    def say(self, line: str = "state") -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        found: dict[str, Any] = json.loads(read_line(self.process))
        return found


@contextmanager
def far_engine(cell: Cell, device: str) -> Iterator[Far]:
    far = Far("cuda:1" if cell.transport == "peer_reads" else device)
    try:
        yield far
    finally:
        assert far.process.stdin is not None
        with suppress(OSError, subprocess.TimeoutExpired):
            far.process.stdin.close()
            far.process.wait(10)
        collect(far.process)
        # A killed one leaves its socket behind.
        shutil.rmtree(Path(far.address.removeprefix("ipc://")).parent, ignore_errors=True)


def run_cell(cell: Cell, device: str) -> float:
    """Carry one fault out and check all that must hold afterwards; seconds from the fault to the last answer to it."""
    actions: dict[str, Callable[[Cell, str], float]] = {
        "kill -9 of the trainer": _kill_trainer,
        "kill -9 of the engine": _kill_engine,
        "a byte of the arena changes": _lie,
        "unknown, misshapen and missing tensors": _bad_input,
        "a second trainer": _second_trainer,
        "the trainer leaves": _leave,
    }
    took = actions[cell.who](cell, device)
    if device == "cuda":  # no error of the GPU is left behind
        torch.cuda.synchronize()
        assert int(torch.ones(10, device=device).sum()) == 10
    return took


def _publisher(far: Far, cell: Cell) -> WeightPublisher:
    return WeightPublisher(far.address, transport=_transport(cell), timeout_s=20)


def _transport(cell: Cell) -> Any:
    return "cuda_ipc" if cell.transport == "peer_reads" else cell.transport


def _serves(far: Far, cell: Cell, device: str, *, old: float) -> None:
    """It holds the old version or, where a commit had been asked for, the new one; and takes the next one."""
    state = far.say()
    allowed = [[old], [2.0]] if cell.phase == "commit" else [[old]]
    assert state["values"] in allowed, state
    with _publisher(far, cell) as publisher:
        publisher.publish(weights(5.0, device=device))
    state = far.say()
    assert state["values"] == [5.0] and state["mixtures"] == [] and not state["moved"], state
    assert eventually(lambda: far.say()["still_open"] == 0), "an allocation is still open"


def _kill_trainer(cell: Cell, device: str) -> float:
    with far_engine(cell, device) as far:
        with _publisher(far, cell) as publisher:
            publisher.publish(weights(1.0, device=device))
        doomed = spawn("trainer_process.py", far.address, cell.phase, _transport(cell), device)
        try:
            assert read_line(doomed) == "ready"
            start = time.monotonic()
            kill(doomed)
            _serves(far, cell, device, old=1.0)
            took = time.monotonic() - start
        finally:
            collect(doomed)
    return took


def _kill_engine(cell: Cell, device: str) -> float:
    with ExitStack() as stack:
        far = stack.enter_context(far_engine(cell, device))
        publisher = stack.enter_context(_publisher(far, cell))
        publisher.publish(weights(1.0, device=device))
        named = list(weights(2.0, device=device).items())
        publisher.begin()
        if cell.phase == "stage":
            publisher.send(named[:4])
        if cell.phase in ("vote", "commit"):
            publisher.send(named)
        pending: Callable[[], object] = publisher.commit
        if cell.phase in ("begin", "stage"):
            pending = lambda: publisher.send(named[4:5])  # noqa: E731
        if cell.phase == "commit":
            far.say("block")
            killer = subprocess.Popen(["sh", "-c", f"sleep 0.3; kill -9 {far.process.pid}"])
            stack.callback(killer.wait)
        else:
            kill(far.process)
        start = time.monotonic()
        try:
            pending()
        except EngineDiedError:
            pass
        else:
            raise AssertionError("the engine is dead and answered")
        took = time.monotonic() - start
        assert took < PROMPTLY_S, f"{took:.1f} s"
    with far_engine(cell, device) as far, _publisher(far, cell) as publisher:
        publisher.publish(weights(3.0, device=device))
        assert far.say()["values"] == [3.0]
    return took


def _lie(cell: Cell, device: str) -> float:
    with far_engine(cell, device) as far, _publisher(far, cell) as publisher:
        publisher.publish(weights(1.0, device=device))
        publisher.begin()
        publisher.send(weights(2.0, device=device))
        start = time.monotonic()
        packed = publisher._endpoint._packed
        assert packed is not None
        packed.buffer[:1] += 1
        if device == "cuda":
            torch.cuda.synchronize()
        try:
            publisher.commit()
            taken = cell.transport in ("shared_memory", "peer_reads")  # into a stage, before that
            assert taken and device == "cuda", "it was not noticed"
        except (
            SyncError
        ) as error:  # after the check of the stage: the check of what is resident finds it
            assert "not what the trainer sent" in str(error), error
        took = time.monotonic() - start
        publisher.publish(weights(5.0, device=device))
        assert far.say()["values"] == [5.0]

        def damage(*_: Any) -> None:
            packed = publisher._endpoint._packed
            assert packed is not None
            packed.buffer[:1] += 1

        def packed_then_damaged(options: Any, deadline: Any, prepare: Any) -> Any:
            return opened(options, deadline, lambda update: (prepare(update), damage())[0])

        opened = publisher._opened_once
        publisher._opened_once = packed_then_damaged  # type: ignore[method-assign]
        publisher._publish_at_once = (  # type: ignore[method-assign]
            lambda *a, real=publisher._publish_at_once: (damage(), real(*a))[1]
        )
        try:
            publisher.publish(weights(6.0, device=device))
        except FingerprintMismatch as error:
            assert "staged bytes" in str(error)
        else:
            raise AssertionError("damaged bytes were staged")
        assert far.say()["values"] == [5.0]
    return took


def _bad_input(cell: Cell, device: str) -> float:
    with far_engine(cell, device) as far:
        with _publisher(far, cell) as publisher:
            publisher.publish(weights(1.0, device=device))
            start = time.monotonic()
            good = weights(2.0, device=device)
            for bad in (
                good | {"unknown": good["norm.weight"]},
                good | {"norm.weight": torch.zeros(8, device=device)},
                {name: tensor for name, tensor in good.items() if name != "norm.weight"},
                good | {"norm.weight": torch.zeros(7, dtype=torch.int32, device=device)},
            ):
                try:
                    publisher.publish(bad)
                except ManifestMismatch:
                    continue
                raise AssertionError("it was accepted")
            took = time.monotonic() - start
        _serves(far, cell, device, old=1.0)
    return took


def _second_trainer(cell: Cell, device: str) -> float:
    with far_engine(cell, device) as far:
        with _publisher(far, cell) as first, _publisher(far, cell) as second:
            second.publish(weights(1.0, device=device))
            first.begin()
            start = time.monotonic()
            try:
                second.publish(weights(2.0, device=device))
            except SessionBusy:
                took = time.monotonic() - start
            else:
                raise AssertionError("two sessions at once")
            first.abort()
        _serves(far, cell, device, old=1.0)
    return took


def _leave(cell: Cell, device: str) -> float:
    with far_engine(cell, device) as far:
        publisher = _publisher(far, cell)
        publisher.publish(weights(1.0, device=device))
        publisher.begin()
        publisher.send(weights(2.0, device=device))
        start = time.monotonic()
        publisher.close()
        took = time.monotonic() - start
        _serves(far, cell, device, old=1.0)
    return took


def document(rows: dict[str, str], device: str) -> str:
    """The table."""
    lines = [
        "# Faults on a GPU",
        "",
        f"`make gpu-faults` wrote this on {device}: {len(rows)} cells, "
        f"{sum('failed' not in value for value in rows.values())} of them as they should be.",
        "In each, an engine and a trainer with tensors on the GPU, in processes of their own; afterwards the engine",
        "serves one whole version and takes the next one, nothing of the trainer stays open, and no error of the GPU",
        "is left behind. Seconds from the fault to the last answer that it has to do with.",
        "",
        "| what | when | " + " | ".join(TRANSPORTS) + " |",
        "|---|---|" + "--:|" * len(TRANSPORTS),
    ]
    for who, phase in dict.fromkeys((cell.who, cell.phase) for cell in CELLS):
        values = [
            rows.get(str(Cell(who=who, phase=phase, transport=transport)), "·")
            for transport in TRANSPORTS
        ]
        lines.append(f"| {who} | {phase} | " + " | ".join(values) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def run(cell: Cell) -> str:
        try:
            return f"{run_cell(cell, device):.2f}"
        except Exception as error:
            print(f"{cell}: {error!r}", flush=True)
            return f"failed: {type(error).__name__}"

    with ThreadPoolExecutor(max(1, min(8, (os.cpu_count() or 1) // 2))) as pool:
        rows = dict(zip(map(str, CELLS), pool.map(run, CELLS), strict=True))
    failed = sum(value.startswith("failed") for value in rows.values())
    text = document(rows, torch.cuda.get_device_name(0) if device == "cuda" else "a CPU")
    where = Path(sys.argv[1]) if len(sys.argv) > 1 else TABLE
    where.write_text(text)
    print(text)
    return failed


if __name__ == "__main__":
    sys.exit(main())
