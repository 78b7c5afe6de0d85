"""Workers of a Ray cluster of tests as forks: Ray's own worker, without the seconds in which it imports everything.

Ray starts a worker with a script that sets up its environment and then runs the worker (`setup_worker_path`). This file
is that script: it hands what it was told to a process that has imported all of it, which forks the worker. The C++ half
of Ray reads the environment when it is imported, with the raylet and the job in it. So one process imports the rest,
and forks one for each job of each raylet, which imports Ray and forks the workers.
"""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

FORKS = "TEST_RAY_FORKS"
"""The folder of the sockets to ask for forks."""
_RAYLET, _JOB = "RAY_RAYLET_PID", "RAY_JOB_ID"
_CONTEXT, _LANGUAGE = "--serialized-runtime-env-context=", "--language="
_FIRST = "first"


class ForkedWorkers:
    """The processes that fork workers for raylets whose `setup_worker_path` is this file."""

    def __init__(self, folder: Path) -> None:
        """folder: with a short path; raylets must have it in `FORKS`. Returns at once: who asks early, waits."""
        with listening(folder, _FIRST) as listener:
            self._process = subprocess.Popen(
                [sys.executable, __file__, "serve", str(listener.fileno())],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                pass_fds=[listener.fileno()],
                stdin=subprocess.PIPE,
            )

    def close(self) -> None:
        """End them; what they have forked goes on."""
        self._process.communicate()


def listening(folder: str | Path, name: str) -> socket.socket:
    """A socket of this name to connect to."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(os.path.join(folder, f"{name}.new"))
    listener.listen(64)
    os.rename(os.path.join(folder, f"{name}.new"), os.path.join(folder, name))
    return listener


# ---- instead of Ray's script -----------------------------------------------------------------------------------------


def ask(args: Sequence[str]) -> None:
    """Have a worker forked that is what Ray's script, with this command line, would become."""
    told = [a.removeprefix(_CONTEXT) for a in args if a.startswith(_CONTEXT)]
    context = json.loads(told[0]) if told else {}
    assert not context.get("command_prefix")
    assert context.get("py_executable") in (None, sys.executable)
    request = {
        "args": [a for a in args if not a.startswith((_CONTEXT, _LANGUAGE))],
        "env": {**os.environ, **context.get("env_vars", {})},
        "cwd": os.getcwd(),
        "fds": [0, 1, 2],
        "prelude": "",
    }
    name = name_of(request)
    if not os.path.exists(os.path.join(os.environ[FORKS], name)):
        send(_FIRST, request)
    send(name, request)


def name_of(request: Mapping[str, Any]) -> str:
    """Of the socket to ask."""
    return f"{request['env'][_RAYLET]}-{request['env'][_JOB]}"


def send(name: str, request: Mapping[str, Any]) -> None:
    """Have it done."""
    with socket.socket(socket.AF_UNIX) as asking:
        asking.connect(os.path.join(os.environ[FORKS], name))
        data = json.dumps(request).encode()
        socket.send_fds(asking, [len(data).to_bytes(4)], [0, 1, 2])
        asking.sendall(data)
        assert asking.recv(1), "no worker was forked"


# ---- the processes that fork -----------------------------------------------------------------------------------------


def serve(listener: socket.socket, *, workers: bool) -> NoReturn:
    """Fork for each request, until standard input ends: a worker, or for the first of a name who forks its workers."""
    from forks import become

    gc.freeze()
    assert len(os.listdir("/proc/self/task")) == 1
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # A worker that has ended is no zombie.
    while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
        connection, _ = listener.accept()
        with connection:
            size, fds, _, _ = socket.recv_fds(connection, 4, 3)
            with connection.makefile("rb") as stream:
                request = json.loads(stream.read(int.from_bytes(size)))
            if workers and os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                become(request, fds)
            for fd in fds:
                os.close(fd)
            folder, name = request["env"][FORKS], name_of(request)
            if not workers and not os.path.exists(os.path.join(folder, name)):
                mine = listening(folder, name)
                if os.fork() == 0:
                    listener.close()
                    serve_job(mine, request["env"])
                mine.close()
            with suppress(OSError):
                connection.sendall(b"1")
    os._exit(0)


def serve_job(listener: socket.socket, environment: Mapping[str, str]) -> NoReturn:
    """Fork the workers of one job on one raylet."""
    os.environ.clear()
    os.environ.update(environment)
    import ray._private.workers.default_worker  # noqa: F401

    import rollout.engine.executors.ray_rank
    import rollout.pool.actor  # noqa: F401

    serve(listener, workers=True)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        from forks import import_all

        import_all()
        serve(socket.socket(fileno=int(sys.argv[2])), workers=False)
    else:
        ask(sys.argv[1:])
