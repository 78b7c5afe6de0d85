"""Main of an engine process: `python -m rollout.engine.child FD`.

Reads a `RankSpec` and an `EngineConfig`, a line of JSON each, from standard input, meets the other ranks, loads its
part of the model, and writes one line of JSON (`{"address": ...}` or `{"error": ..., "code": ...}`) to file descriptor
FD. Then it serves until it is told to shut down or standard input ends, which means that its owner is gone. Only rank 0
listens to clients; the address of another rank is empty.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading

import msgspec

from weight_sync.rpc import RpcServer

from ..config import EngineConfig
from .build import build_core
from .ranks import RankSpec
from .wire import REQUEST_TYPES


def main() -> int:
    """Serve one engine; returns the exit code."""
    ready_fd = int(sys.argv[1])
    logging.basicConfig(
        level=os.environ.get("ROLLOUT_LOG_LEVEL", "WARNING"),
        format=f"[engine {os.getpid()}] %(levelname)s %(name)s: %(message)s",
    )
    # Ctrl-C in a terminal reaches the whole process group; the owner decides when the engine ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    spec = msgspec.json.decode(sys.stdin.buffer.readline(), type=RankSpec)
    config = msgspec.json.decode(sys.stdin.buffer.readline(), type=EngineConfig)
    servers: list[RpcServer] = []
    lifeline = threading.Thread(
        target=_end_with_owner, args=(servers,), name="rollout-lifeline", daemon=True
    )
    lifeline.start()
    try:
        core = build_core(config, spec)
        if spec.rank == 0:
            servers.append(RpcServer(core.submit, REQUEST_TYPES, bind=config.listen))
            servers[0].start()
    except Exception as error:
        _report(ready_fd, {"error": str(error), "code": type(error).__name__})
        logging.getLogger(__name__).debug("start failed", exc_info=True)
        return 1
    _report(ready_fd, {"address": servers[0].address if servers else ""})
    try:
        core.run()
    finally:
        for server in servers:
            server.close()
    return 0


def _report(fd: int, message: dict[str, str]) -> None:
    with os.fdopen(fd, "w") as pipe:
        pipe.write(json.dumps(message) + "\n")


def _end_with_owner(servers: list[RpcServer]) -> None:
    """Block until standard input ends, then leave at once: nobody is there to read a last word."""
    while sys.stdin.buffer.read(4096):
        pass
    for server in servers:
        server.close()  # Removes its socket file.
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
