"""Carries out every cell of `gpu_fault_cells`, and writes the table of what happened.

    python tests/faults/gpu_faults.py [PATH]         runs all cells on this machine's GPUs; writes PATH or
                                                     docs/faults_gpu.md
    python tests/faults/gpu_faults.py --cell NAME    runs one of them in this process

Engine and trainer are real processes with tensors on the GPU, or on two GPUs where there are two ("peer_reads" and
"nccl"); the model is a toy, since what is tested is the way of the bytes. Cells that need more GPUs than there are are
left out, and the table says so. With `device="cpu"` the same cells run over what stands in for a GPU's memory, and over
gloo in the place of NCCL.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
SYNC = HERE.parent / "sync"
TABLE = HERE.parent.parent / "docs" / "faults_gpu.md"
sys.path[:0] = [str(HERE), str(HERE.parent), str(SYNC)]

from gpu_fault_cells import CELLS, Cell, document  # noqa: E402
from gpu_rank_deaths import kill_rank  # noqa: E402
from ipc_stand_in import PlainPatch, stand_in  # noqa: E402
from stopped import go_on, stop  # noqa: E402
from sync_support import collect, eventually, kill, read_line, spawn, weights  # noqa: E402

from weight_sync import WeightPublisher  # noqa: E402
from weight_sync.errors import (  # noqa: E402
    DeadlineExceeded,
    EngineDiedError,
    FingerprintMismatch,
    ManifestMismatch,
    SessionBusy,
    SyncError,
)

CELL_S = 200.0
"""A cell that takes longer has failed, and is ended."""
TOOK = "seconds: "
"""How the line begins in which the process of a cell says how long it took."""


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
    place = {"peer_reads": "cuda:1", "nccl": "cuda:0"}.get(cell.transport, "cuda")
    far = Far(place if device == "cuda" else device)
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
        "kill -9 of rank 0 of two": _kill_rank,
        "kill -9 of rank 1 of two": _kill_rank,
        "a late member of the group": _late_member,
        "a late trainer with a group": _late_trainer,
    }
    if device == "cpu":
        return actions[cell.who](cell, device)
    torch.cuda.init()
    # The trainer's, which is this process: over NCCL it has one of its own.
    with torch.cuda.device(int(cell.transport == "nccl" and cell.num_gpus == 2)):
        took = actions[cell.who](cell, device)
        torch.cuda.synchronize()  # no error of the GPU is left behind
        assert int(torch.ones(10, device=device).sum()) == 10
    return took


def _publisher(far: Far, cell: Cell, timeout_s: float = 20.0) -> WeightPublisher:
    return WeightPublisher(far.address, transport=_transport(cell), timeout_s=timeout_s)


def _transport(cell: Cell) -> Any:
    return {"peer_reads": "cuda_ipc", "nccl": "process_group"}.get(cell.transport, cell.transport)


def _serves(far: Far, cell: Cell, device: str, *, old: float) -> None:
    """It holds the old version or, where a commit had been asked for, the new one; and takes the next one."""
    state = far.say()
    allowed = [[old], [2.0]] if cell.phase == "commit" else [[old]]
    assert state["values"] in allowed, state
    with _publisher(far, cell) as publisher:
        _publish(publisher, 5.0, cell, device)
    state = far.say()
    assert state["values"] == [5.0] and state["mixtures"] == [] and not state["moved"], state
    assert eventually(lambda: far.say()["still_open"] == 0), "an allocation is still open"
    assert eventually(lambda: far.say()["threads"] == []), "it is still in a group"


def _publish(publisher: WeightPublisher, value: float, cell: Cell, device: str) -> None:
    """As soon as the session of a trainer whose death shows in its group is over."""
    end = time.monotonic() + (cell.promptly_s if cell.transport == "nccl" else 0.0)
    while True:
        try:
            publisher.publish(weights(value, device=device))
            return
        except SessionBusy:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)


def _kill_trainer(cell: Cell, device: str) -> float:
    with far_engine(cell, device) as far:
        with _publisher(far, cell) as publisher:
            publisher.publish(weights(1.0, device=device))
        doomed = _doomed(far, cell, device)
        try:
            assert read_line(doomed) == "ready"
            if cell.transport == "nccl" and cell.phase == "stage":
                time.sleep(1.0)  # for the kernel to be there; nothing tells from outside
            start = time.monotonic()
            kill(doomed)
            _serves(far, cell, device, old=1.0)
            took = time.monotonic() - start
        finally:
            collect(doomed)
    return took


def _doomed(far: Far, cell: Cell, device: str) -> subprocess.Popen[str]:
    """A trainer that stops in the phase. Over a group it has announced bytes in "stage" that the engine waits for."""
    if cell.transport != "nccl":
        return spawn("trainer_process.py", far.address, cell.phase, _transport(cell), device)
    phase = "waiting in a kernel" if cell.phase == "stage" else cell.phase
    place = "cuda:1" if device == "cuda" else device
    return spawn("group_trainer_process.py", far.address, phase, place)


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
        except SyncError:  # over a group, the group may tell first
            assert cell.transport == "nccl"
        else:
            raise AssertionError("the engine is dead and answered")
        took = time.monotonic() - start
        assert took < cell.promptly_s, f"{took:.1f} s"
    with far_engine(cell, device) as far, _publisher(far, cell) as publisher:
        publisher.publish(weights(3.0, device=device))
        assert far.say()["values"] == [3.0]
    return took


def _kill_rank(cell: Cell, device: str) -> float:
    return kill_rank(int(cell.who.split()[4]), cell.phase, _transport(cell), device)


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
            taken = ("shared_memory", "peer_reads") if device == "cuda" else ()
            assert cell.transport in (*taken, "nccl"), "it was not noticed"  # into a stage before
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
            if packed.buffer.is_cuda:  # nothing orders it before what another process reads
                torch.cuda.synchronize()

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


def _late_member(cell: Cell, device: str) -> float:
    """The engine is stopped from when its trainer serves the group until after the deadline, or for a moment."""
    in_time = cell.phase == "but in time"
    with far_engine(cell, device) as far:
        with _publisher(far, cell) as publisher:
            publisher.publish(weights(1.0, device=device))
        pid = far.process.pid
        with _publisher(far, cell, timeout_s=60.0 if in_time else 3.0) as publisher:
            make = publisher._endpoint._make_group

            def stopped_first(*arguments: Any) -> Any:
                stop(pid)
                if in_time:
                    threading.Timer(1.5, go_on, [pid]).start()
                return make(*arguments)

            publisher._endpoint._make_group = stopped_first  # type: ignore[method-assign]
            start = time.monotonic()
            try:
                publisher.publish(weights(2.0, device=device))
            except DeadlineExceeded:
                assert not in_time
            else:
                assert in_time, "the engine was stopped and answered"
            finally:
                go_on(pid)
            took = time.monotonic() - start
            assert 1.0 < took < 3.0 + cell.promptly_s, f"{took:.1f} s"
            assert far.say()["values"] == [2.0 if in_time else 1.0]
            # What it is told late of the group that was given up keeps it from nothing.
            publisher._endpoint._make_group = make  # type: ignore[method-assign]
            publisher.publish(weights(3.0, device=device), timeout_s=20.0)
            assert far.say()["values"] == [3.0]
        _serves(far, cell, device, old=3.0)
    return took


def _late_trainer(cell: Cell, device: str) -> float:
    """It makes its group, and has the engine join, between two buckets of another's update over a group."""
    with far_engine(cell, device) as far:
        with _publisher(far, cell) as first, _publisher(far, cell) as late:
            first.publish(weights(1.0, device=device))
            named = list(weights(2.0, device=device).items())
            first.begin()
            first.send(named[:4])
            start = time.monotonic()
            try:
                late.publish(weights(3.0, device=device))
            except SessionBusy:
                took = time.monotonic() - start
            else:
                raise AssertionError("two sessions at once")
            assert took < cell.promptly_s, f"{took:.1f} s"
            assert far.say()["values"] == [1.0]
            first.send(named[4:])
            first.commit()
            assert far.say()["values"] == [2.0]
            late.publish(weights(3.0, device=device))
            assert far.say()["values"] == [3.0]
            first.publish(weights(4.0, device=device))
        _serves(far, cell, device, old=4.0)
    return took


def in_a_process(cell: Cell) -> str:
    """Seconds, or how it failed. Cells run side by side, and a kernel that waits in one must not hold up another."""
    process = subprocess.Popen(
        [sys.executable, __file__, "--cell", str(cell)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        said, _ = process.communicate(timeout=CELL_S)
        took = [line.removeprefix(TOOK) for line in said.splitlines() if line.startswith(TOOK)]
        if process.returncode == 0:
            return took[0]
        why = [f"exit status {process.returncode}"]
        if process.returncode == 1:
            why = said.strip().splitlines()[-1:]
    except subprocess.TimeoutExpired:
        said, why = "", [f"it took more than {CELL_S:.0f} s"]
        process.kill()  # its engines and trainers see that and end
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
    print(f"{cell}: {why[0]}\n{said}", flush=True)
    return f"failed: {why[0].split(':')[0]}"


def main() -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if sys.argv[1:2] == ["--cell"]:
        if device == "cpu":
            stand_in(PlainPatch())
        [cell] = [cell for cell in CELLS if str(cell) == sys.argv[2]]
        print(f"{TOOK}{run_cell(cell, device):.2f}")
        return 0
    num_gpus = torch.cuda.device_count() if device == "cuda" else 3  # what stands in is for all
    chosen = [cell for cell in CELLS if cell.num_gpus <= num_gpus]
    chosen.sort(key=lambda cell: "rank" not in cell.who)  # those that take longest
    with ThreadPoolExecutor(max(1, min(8, (os.cpu_count() or 1) // 2))) as pool:
        rows = dict(zip(map(str, chosen), pool.map(in_a_process, chosen), strict=True))
    failed = sum(value.startswith("failed") for value in rows.values())
    name = f"{num_gpus} x {torch.cuda.get_device_name(0)}" if device == "cuda" else "a CPU"
    text = document(rows, name)
    where = Path(sys.argv[1]) if len(sys.argv) > 1 else TABLE
    where.write_text(text)
    print(text)
    return failed


if __name__ == "__main__":
    sys.exit(main())
