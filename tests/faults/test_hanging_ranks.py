"""A rank that waits for ever, as for a GPU on which a kernel waits for a rank that has died: it ends all the same.

Nobody asks the engine for anything, and nobody closes it: callers that wait have its ranks ended, too.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from engine_deaths import all_gone
from engine_faults import Breakpoints, FaultyEngine, Nursery, Stream, error_name, kill_all

from rollout.engine.executors import end_within, rank_watch
from rollout.protocol.commands import Shutdown
from rollout.protocol.wire import REPLY_TYPES
from weight_sync.errors import ERRORS, EngineDiedError
from weight_sync.wire.rpc import RpcClient

SOON_S = 2.0
HEARTBEAT_S = 0.5


@pytest.mark.parametrize("hangs", ["stop", "hang"])
def test_a_rank_that_cannot_end_by_itself_is_ended_when_another_one_has_died(
    make_engine_with_faults: Callable[..., FaultyEngine], hangs: str
) -> None:
    """Rank 0 answers all calls, and then waits; or does not even answer."""
    engine = make_engine_with_faults(tp_size=2)
    getattr(engine.points, hangs)("end", 0)
    stream, pids = Stream(engine.engine), engine.pids
    kill_all(pids[1:])
    all_gone(pids, SOON_S)
    assert isinstance(stream.died(), EngineDiedError)
    with pytest.raises(EngineDiedError, match=f"process {pids[1]}.* SIGKILL"):
        engine.engine.status()
    engine.close()


@pytest.mark.parametrize("rank", [0, 1])
def test_so_is_one_that_hangs_in_a_step(
    make_engine_with_faults: Callable[..., FaultyEngine], rank: int
) -> None:
    engine = make_engine_with_faults(tp_size=2)
    engine.points.hang("step", rank)
    stream, pids = Stream(engine.engine, wait=False), engine.pids
    engine.points.reached("step", rank)
    kill_all([pids[1 - rank]])
    all_gone(pids, SOON_S)
    assert isinstance(stream.died(), EngineDiedError)
    engine.close()


@pytest.mark.parametrize("hangs", ["stop", "hang"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_ends_by_itself_where_its_owner_does_nothing(
    nursery: Nursery,
    folder: Path,
    tmp_path: Path,
    hangs: str,
    rank: int,
    socket_folders: Callable[[], set[str]],
) -> None:
    """Its owner is killed in the end, and leaves its sockets in a folder of this test's."""
    points = Breakpoints(tmp_path / "points")
    (points.folder / "silence").write_text(str(4 * HEARTBEAT_S))
    getattr(points, hangs)("end", rank)
    owner = nursery.owner(folder, points.folder, tp_size=2)
    pids = owner.says()["pids"]
    os.kill(owner.pid, signal.SIGSTOP)
    kill_all([pids[1 - rank]])
    all_gone(pids, HEARTBEAT_S + end_within.FAILED_S + SOON_S)
    owner.kill()


def test_ranks_that_are_told_to_end_have_time_and_no_more(
    make_engine_with_faults: Callable[..., FaultyEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank_watch, "END_S", 1.0)
    engine = make_engine_with_faults(tp_size=2)
    engine.points.stop("end", 1)
    pids, start = engine.pids, time.monotonic()
    other = RpcClient(engine.address, REPLY_TYPES, errors=ERRORS)
    other.call(Shutdown(), 20.0)
    other.close()
    all_gone(pids, 1.0 + SOON_S)
    assert time.monotonic() - start > 1.0
    assert error_name(engine.engine.status) == "EngineDiedError"
    engine.close()


def ignore_alarms() -> None:
    signal.signal(signal.SIGALRM, signal.SIG_IGN)


def block_alarms() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})


@pytest.mark.parametrize("owner_does", [None, ignore_alarms, block_alarms])
@pytest.mark.parametrize("read", [True, False])
def test_the_bound_needs_neither_the_interpreter_nor_a_reader(
    read: bool, owner_does: Callable[[], None] | None
) -> None:
    """Nor an owner that leaves the system's alarm alone: what it ignores or blocks, its children do, too."""
    code = (
        "import ctypes, os, sys, threading; from rollout.engine.executors.end_within import end_within\n"
        "os.set_blocking(2, False)\n"
        "try:\n"
        f"    while {not read}: os.write(2, bytes(4096))\n"
        "except BlockingIOError: pass\n"
        "os.set_blocking(2, True)\n"
        "done = threading.Event()\n"
        "def end(): end_within(0.3); done.set(); threading.Event().wait()\n"
        "threading.Thread(target=end, daemon=True).start(); done.wait()\n"
        "end_within(100.0)\n"
        "ctypes.PyDLL(None).sleep(60)\n"
    )
    start = time.monotonic()
    with subprocess.Popen(
        [sys.executable, "-c", code], stderr=subprocess.PIPE, preexec_fn=owner_does
    ) as process:
        said = process.communicate(timeout=30)[1] if read else b""
        process.wait(30)
        assert process.returncode == (1 if read else -signal.SIGALRM)
    assert time.monotonic() - start < 20
    assert (b"<module>" in said) == read
