"""Starts ranks of engines as forks of a process that has imported everything, with breakpoints in them.

A rank that is started so does what `rollout.engine.executors.child` does, a second earlier. It becomes a child of the
process that asked for it, so that this one can wait for it and see how it ended.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

_SET_CHILD_SUBREAPER = 36


class Zygote:
    """The asking end; `start` may be called from any thread."""

    def __init__(self, *, fork: bool = False) -> None:
        """fork: from this process, which has one thread and has imported everything; else a new interpreter."""
        self._lock = threading.Lock()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket = ours
        if fork:
            if os.fork() == 0:
                ours.close()
                serve(theirs)
        else:
            command = [sys.executable, __file__, str(theirs.fileno())]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment)
        theirs.close()

    def start(self, points: Path, env: Mapping[str, str], fds: Sequence[int]) -> int:
        """Start a rank; returns its process id. fds: its standard input, and where it says that it is ready."""
        request = {"points": str(points), "env": dict(env)}
        with self._lock:
            _become_reaper(True)
            try:
                socket.send_fds(self._socket, [json.dumps(request).encode()], fds)
                return int(self._socket.recv(64))
            finally:
                _become_reaper(False)

    def close(self) -> None:
        """End it; ranks go on."""
        self._socket.close()


class ForkedRank:
    """What `subprocess.Popen` would be for a rank: as much of it as `rollout.engine.executors.rank_process` uses."""

    def __init__(self, zygote: Zygote, points: Path, ready: int, env: Mapping[str, str]) -> None:
        read_end, write_end = os.pipe()
        try:
            self.pid = zygote.start(points, env, [read_end, ready])
        finally:
            os.close(read_end)
        self.stdin = os.fdopen(write_end, "wb")
        self.stderr = open(os.devnull, "rb")  # It writes to ours, as forks do.
        self.returncode: int | None = None
        self._lock = threading.Lock()

    def poll(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        with self._lock:
            if self.returncode is None:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                if pid:
                    self.returncode = os.waitstatus_to_exitcode(status)
            return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end."""
        end = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if end is not None and time.monotonic() >= end:
                raise subprocess.TimeoutExpired("a rank", timeout or 0.0)
            time.sleep(0.002)
        return code

    def kill(self) -> None:
        """kill -9, unless it is gone."""
        with self._lock:
            if self.returncode is None:
                os.kill(self.pid, signal.SIGKILL)


def serve(connection: socket.socket) -> NoReturn:
    """Fork a rank for each request, until the other end is closed."""
    import torch

    import weight_sync.receiver.receiver  # noqa: F401

    torch.set_num_threads(1)
    while True:
        data, fds, _, _ = socket.recv_fds(connection, 1 << 20, 2)
        if not data:
            os._exit(0)
        request = json.loads(data)
        read_end, write_end = os.pipe()
        between = os.fork()
        if between == 0:  # Its child's parent is whoever asked, as soon as it has gone itself.
            between = os.getpid()
            child = os.fork()
            if child == 0:
                while (
                    os.getppid() == between
                ):  # Its parent is its owner when it begins, as in life.
                    time.sleep(0.0005)
                connection.close()
                os.close(read_end)
                os.close(write_end)
                become_rank(request, *fds)
            os.write(write_end, str(child).encode())
            os._exit(0)
        for fd in (write_end, *fds):
            os.close(fd)
        os.waitpid(between, 0)
        connection.send(os.read(read_end, 64))
        os.close(read_end)


def become_rank(request: dict[str, Any], stdin: int, ready: int) -> NoReturn:
    """Be `rollout.engine.executors.child` with breakpoints."""
    from engine_breakpoints import install

    from rollout.engine.executors import child

    code = 1
    try:
        os.environ.clear()
        os.environ.update(request["env"])
        tempfile.tempdir = None
        os.dup2(stdin, 0)
        os.close(stdin)
        sys.stdin = os.fdopen(0, closefd=False)  # The old object may have read ahead.
        sys.argv = ["child", str(ready)]
        install(Path(request["points"]))
        code = child.main()
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
    finally:
        sys.stderr.flush()
        os._exit(code)


def _become_reaper(on: bool) -> None:
    """Whether orphans below this process become its children."""
    if ctypes.CDLL(None, use_errno=True).prctl(_SET_CHILD_SUBREAPER, int(on), 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    serve(socket.socket(fileno=int(sys.argv[1])))
