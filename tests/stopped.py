"""Processes that a test stops for a while, and threads that look as if they had been."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

_PATIENCE_S = 30.0


def stop(pid: int) -> None:
    """SIGSTOP, and wait until no thread of the process goes on.

    `os.kill` returns when the signal is queued. One thread takes it, when it runs next, and the others are stopped one
    by one after that: until then they may carry out what the process is told.
    """
    os.kill(pid, signal.SIGSTOP)
    end = time.monotonic() + _PATIENCE_S
    while going := _going_on(pid):
        assert time.monotonic() < end, f"threads of {pid} that were not stopped: {going}"
        time.sleep(0.001)


def go_on(pid: int) -> None:
    """The end of `stop`."""
    os.kill(pid, signal.SIGCONT)


def _going_on(pid: int) -> list[str]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            stat = (task / "stat").read_text()
        except OSError:
            continue  # It has ended.
        if stat.rsplit(")", 1)[1].split()[0] not in "TtZX":
            found.append(stat)
    return found


class LateThreads:
    """In the place of a module's `time`: for `threads`, every deadline has passed."""

    def __init__(self) -> None:
        self.threads: set[threading.Thread] = set()

    def monotonic(self) -> float:
        return time.monotonic() + (1e6 if threading.current_thread() in self.threads else 0.0)
