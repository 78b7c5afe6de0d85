"""Main of an engine process, which gets a file descriptor FD as its argument.

Reads a `RankSpec` and an `EngineConfig`, a line of JSON each, from standard input, meets the other ranks, loads its
part of the model, and writes one line of JSON (`{"address": ...}` or `{"error": ..., "code": ...}`) to file descriptor
FD. Then it serves until it is told to shut down, gets a SIGTERM, its owner ends, or standard input ends or says a word,
which means that its owner has let go. Only rank 0 listens to clients; the address of another rank is empty.

Nothing keeps it: from when its end is certain, `end_within` bounds what it may still wait for.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import resource
import shutil
import signal
import sys
import threading
import time
import traceback
from typing import NoReturn

import msgspec

from weight_sync.process_groups.children import life_of, readable

from ...config import EngineConfig
from ..loop.ranks import RankSpec
from .end_within import END_S, FAILED_S, end_within
from .rank_server import RankServer, failure_report, log_level


def main() -> int:
    """Serve one engine; returns the exit code."""
    ready_fd, owner = int(sys.argv[1]), os.getppid()
    # Ctrl-C in a terminal reaches the whole process group; the owner decides when the engine ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Every client and every group of trainers takes some; a soft limit of 1,024 is there for programs of another age.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    spec = msgspec.json.decode(sys.stdin.buffer.readline(), type=RankSpec)
    config = msgspec.json.decode(sys.stdin.buffer.readline(), type=EngineConfig)
    logging.basicConfig(
        level=log_level(config),
        format=f"[engine {os.getpid()}] %(levelname)s %(name)s: %(message)s",
    )
    servers: list[RankServer] = []
    terminated = _terminated()
    lifeline = threading.Thread(
        target=_end_with_owner,
        args=(servers, spec, owner, terminated),
        name="rollout-lifeline",
        daemon=True,
    )
    lifeline.start()
    try:
        servers.append(RankServer(config, spec))
    except Exception as error:
        end_within(END_S)
        _report(ready_fd, failure_report(error))
        return 1
    _report(ready_fd, {"address": servers[0].address})
    try:
        servers[0].run()
    except BaseException as error:
        _leave(error)
    return 0


def _leave(error: BaseException) -> NoReturn:
    """Say why and be gone: the interpreter's end gives back memory of a GPU that may wait for a rank that has died."""
    with contextlib.suppress(Exception):
        traceback.print_exception(error)
        sys.stderr.flush()
    os._exit(1)


def _report(fd: int, message: dict[str, str]) -> None:
    with os.fdopen(fd, "w") as pipe:
        pipe.write(json.dumps(message) + "\n")


def _terminated() -> int:
    """A descriptor that is readable after a SIGTERM, whatever the main thread waits for.

    When an owner in a Ray actor dies, Ray sends one to its whole process group: no reason to leave files behind.
    """
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    signal.set_wakeup_fd(write_end)
    signal.signal(signal.SIGTERM, lambda *_: None)
    return read_end


def _end_with_owner(servers: list[RankServer], spec: RankSpec, owner: int, terminated: int) -> None:
    """Block until the owner ends or lets go, or a SIGTERM; then leave at once: nobody is there to read a last word."""
    # Not `sys.stdin`: a thread that waits inside it holds its lock, and the interpreter aborts over that at its end.
    ready = readable([0, terminated, *life_of(owner)])
    end_within(FAILED_S)
    for server in servers:
        server.close_socket()
    if spec.socket_folder:
        shutil.rmtree(spec.socket_folder, ignore_errors=True)  # The other ranks are ending, too.
    if spec.owner_folder and _has_died(owner):  # Else it has only let go of this rank.
        shutil.rmtree(spec.owner_folder, ignore_errors=True)
    os._exit(128 + signal.SIGTERM if terminated in ready else 0)


def _has_died(owner: int) -> bool:
    """Whether our parent has. Its pipes end a moment before its children get another parent."""
    deadline = time.monotonic() + 0.2
    while os.getppid() == owner and time.monotonic() < deadline:
        time.sleep(0.01)
    return os.getppid() != owner


if __name__ == "__main__":
    sys.exit(main())
