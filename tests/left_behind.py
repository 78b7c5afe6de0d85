"""What tests must not leave behind: timers and threads that act on the test after them, files, arenas in memory."""

from __future__ import annotations

import gc
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

TESTS = str(Path(__file__).parent)
GRACE_S = 30.0


def of_tests(thread: threading.Thread) -> bool:
    """A timer, a pool's worker, or a thread that runs code of a test, of a class or function in these folders."""
    target = getattr(thread, "_target", None)
    module = sys.modules.get(getattr(target, "__module__", None) or "")
    mine = str(getattr(module, "__file__", "")).startswith(TESTS)
    pooled = target is not None and target.__module__ == "concurrent.futures.thread"
    return isinstance(thread, threading.Timer) or pooled or mine


def started_since(before: set[threading.Thread]) -> list[threading.Thread]:
    """Timers, pools' workers and threads of tests that were not there before."""
    return [t for t in threading.enumerate() if t not in before and of_tests(t)]


def ours(thread: threading.Thread) -> bool:
    """Not a thread of Ray or another library that goes on for the life of the process."""
    target = getattr(thread, "_target", None)
    module = getattr(target, "__module__", None) or type(thread).__module__
    return module.split(".")[0] in ("rollout", "weight_sync", "trainers_integration")


def num_arenas() -> int:
    """Memory files of arenas that this process has open."""
    count = 0
    for fd in os.listdir("/proc/self/fd"):
        try:
            count += "memfd:weight-arena" in os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            pass  # the one that lists them
    return count


def wait_until_gone(what: str, left: Callable[[], Any]) -> None:
    """Fail when something is still left after a while."""
    end = time.monotonic() + GRACE_S
    while (found := left()) and time.monotonic() < end:
        time.sleep(0.01)
    assert not found, f"the test left {what} behind: {found}"


@pytest.fixture(autouse=True)
def no_timer_or_thread_outlives_its_test(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails a test whose timers or threads go on when it has ended."""
    before = set(threading.enumerate())
    yield
    request.node.funcargs.clear()  # pytest keeps what it gave the test, an arena for one, until all is torn down
    wait_until_gone("threads", lambda: started_since(before))


@pytest.fixture(autouse=True, scope="module")
def nothing_outlives_its_module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fails a module whose engines and publishers, also those that its tests share, leave something of theirs."""
    folder = tmp_path_factory.mktemp("m")
    threads, arenas = set(threading.enumerate()), num_arenas()
    with pytest.MonkeyPatch.context() as patched:  # others of this machine have temporary files too
        patched.setenv("TMPDIR", str(folder))
        patched.setattr(tempfile, "tempdir", None)
        yield

    def left() -> list[threading.Thread]:
        return [t for t in threading.enumerate() if t not in threads and ours(t)]

    wait_until_gone("threads", left)
    wait_until_gone("sockets", lambda: [path.name for path in folder.glob("rollout-*")])
    gc.collect()  # errors and the frames that they name may hold each other, and an arena
    wait_until_gone("arenas", lambda: max(0, num_arenas() - arenas))
