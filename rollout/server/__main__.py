"""Main of a server's process, which gets a file descriptor FD as its argument.

Reads its settings, a line of JSON, from standard input, and writes `{"url": ...}` or `{"error": ...}` to FD. It ends
with a SIGTERM, when its owner ends, and when standard input ends, which means that its owner has let go.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading

from weight_sync.process_groups.children import life_of, readable

from ..errors import RolloutError
from .launch import launch_server


def main() -> int:
    """Serve; returns the exit code."""
    fd, owner = int(sys.argv[1]), os.getppid()
    line = b""
    while not line.endswith(b"\n"):  # Not `sys.stdin`: it would read ahead.
        part = os.read(0, 1 << 16)
        if not part:
            return 1
        line += part
    settings = json.loads(line)
    life = life_of(owner)
    threading.Thread(
        target=_end_with_owner, args=(life,), name="rollout-lifeline", daemon=True
    ).start()
    said = False

    def say(message: dict[str, str]) -> None:
        nonlocal said
        if not said:
            said = True
            with os.fdopen(fd, "w") as pipe:
                pipe.write(json.dumps(message) + "\n")

    try:
        launch_server(
            settings["model_path"],
            address=settings["address"],
            num_replicas=settings["num_replicas"],
            server=settings["server"],
            on_ready=lambda url: say({"url": url}),
            **settings["engine_options"],
        )
    except Exception as error:
        if said or not isinstance(error, RolloutError | OSError | ValueError | TypeError):
            raise
        say({"error": str(error)})
        return 1
    return 0


def _end_with_owner(life: list[int]) -> None:
    while ready := readable([0, *life]):
        if 0 not in ready or not os.read(0, 1 << 16):
            os.kill(os.getpid(), signal.SIGTERM)
            return


if __name__ == "__main__":
    sys.exit(main())
