"""A server in a child process, which ends with its owner."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from weight_sync.process_groups.children import readable, start_command

from ..errors import ConfigError, RolloutError
from .config import ServerConfig

_MOST_LAST_WORDS = 4000


class ServerProcess:
    """A running server of another process; `close()`, and the end of a `with` block, end it."""

    def __init__(self, process: subprocess.Popen[bytes], url: str, close_s: float) -> None:
        self.url = url
        self.pid = process.pid
        self._process = process
        self._finalizer = weakref.finalize(self, _end, process, close_s)

    def close(self) -> int:
        """End it: running requests may finish first. Safe to call twice; returns its exit code."""
        self._finalizer()
        return self._process.wait()

    @property
    def is_alive(self) -> bool:
        """It runs."""
        return self._process.poll() is None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def launch_server_process(
    model_path: str | Path | None = None,
    *,
    address: str | None = None,
    num_replicas: int = 1,
    server: ServerConfig | Mapping[str, Any] | None = None,
    timeout_s: float = 180.0,
    **engine_options: Any,
) -> ServerProcess:
    """As `launch_server`, in a child process; returns when it answers at `ServerProcess.url`.

    The child ends when this process does. Raises `RolloutError` with its last words when it does not come up within
    `timeout_s` seconds.
    """
    from .launch import server_config

    config = server_config(server)
    config.check()
    settings = {
        "model_path": None if model_path is None else str(model_path),
        "address": address,
        "num_replicas": num_replicas,
        "server": {name: getattr(config, name) for name in ServerConfig.__slots__},
        "engine_options": engine_options,
    }
    try:
        line = json.dumps(settings).encode() + b"\n"
    except TypeError as error:
        raise ConfigError(
            f"launch_server_process: {error}; pass names, such as 'float32'"
        ) from None
    read_end, write_end = os.pipe()
    with os.fdopen(read_end, "rb") as ready:
        try:
            process = subprocess.Popen(
                start_command("rollout.server.__main__", str(write_end)),
                stdin=subprocess.PIPE,
                pass_fds=(write_end,),
            )
        finally:
            os.close(write_end)
        assert process.stdin is not None
        try:
            process.stdin.write(line)
            process.stdin.flush()
            word = _first_line(ready.fileno(), timeout_s)
        except BaseException:
            _end(process, 5.0)
            raise
    if "url" not in word:
        _end(process, 5.0)
        raise RolloutError(f"the server did not start: {word.get('error', 'it ended')}")
    return ServerProcess(process, word["url"], config.drain_s + 30.0)


def _first_line(fd: int, timeout_s: float) -> dict[str, str]:
    deadline = time.monotonic() + timeout_s
    content = b""
    while not content.endswith(b"\n"):
        left = deadline - time.monotonic()
        if left <= 0 or not readable([fd], left):
            return {"error": f"no answer within {timeout_s:g} s; raise timeout_s"}
        part = os.read(fd, _MOST_LAST_WORDS)
        if not part:
            return {"error": "its process ended; look at its standard error"}
        content += part
    found: dict[str, str] = json.loads(content)
    return found


def _end(process: subprocess.Popen[bytes], patience_s: float) -> None:
    """Let go of its lifeline and wait; kill it when it does not end."""
    if process.stdin is not None:
        with contextlib.suppress(OSError):
            process.stdin.close()
    try:
        process.wait(patience_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
