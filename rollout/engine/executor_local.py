"""The engine in a child process, behind the same surface, over ZMQ with typed messages.

The child gets its configuration as JSON on its standard input, which then stays open as a lifeline: when this process
goes away, however it does, the child reads end-of-file and ends itself. Nothing is pickled.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
import time
from concurrent.futures import Future
from typing import Any

import msgspec

from weight_sync.channel import Channel, RpcChannel
from weight_sync.errors import EngineDiedError, SyncError
from weight_sync.rpc import RpcClient

from ..config import EngineConfig
from ..errors import ERRORS
from .commands import Shutdown
from .executor import OnChunk
from .wire import REPLY_TYPES


class LocalExecutor:
    """Starts the child, waits until its model is loaded, and notices when it dies."""

    def __init__(self, config: EngineConfig) -> None:
        read_end, write_end = os.pipe()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "rollout.engine.child", str(write_end)],
                stdin=subprocess.PIPE,
                pass_fds=(write_end,),
                env=_child_environment(config),
            )
        finally:
            os.close(write_end)
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(msgspec.json.encode(config) + b"\n")
            self._process.stdin.flush()
            self._address = self._await_ready(read_end, config.start_timeout_s)
            self._client = RpcClient(
                self._address, REPLY_TYPES, errors=ERRORS, liveness=self._why_dead
            )
        except BaseException:
            self._stop_process(grace_s=0.0)
            raise
        finally:
            os.close(read_end)

    def submit(
        self, body: Any, *, timeout_s: float, on_chunk: OnChunk | None = None
    ) -> Future[Any]:
        return self._client.submit(body, timeout_s=timeout_s, on_chunk=on_chunk)

    def weight_channel(self) -> Channel:
        return RpcChannel(self._client)

    @property
    def address(self) -> str:
        return self._address

    @property
    def pid(self) -> int:
        """Process id of the child."""
        return self._process.pid

    def close(self) -> None:
        if self._process.poll() is None:
            with contextlib.suppress(SyncError, OSError):
                self._client.call(Shutdown(), timeout_s=5.0)
        self._client.close()
        self._stop_process(grace_s=10.0)

    def _await_ready(self, read_end: int, timeout_s: float) -> str:
        """Address that the child reports once it serves; its error, should it fail to start."""
        deadline = time.monotonic() + timeout_s
        data = b""
        with selectors.DefaultSelector() as selector:
            selector.register(read_end, selectors.EVENT_READ)
            while not data.endswith(b"\n"):
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise EngineDiedError(
                        f"the engine process was not ready within {timeout_s:.3g} s; raise start_timeout_s"
                    )
                chunk = os.read(read_end, 1 << 16)
                if not chunk:
                    code = self._process.wait(timeout=10.0)
                    raise EngineDiedError(
                        f"the engine process ended while starting ({_exit_words(code)}); its messages are above"
                    )
                data += chunk
        report = json.loads(data)
        if "error" in report:
            raise ERRORS.get(report["code"], RuntimeError)(report["error"])
        address: str = report["address"]
        return address

    def _why_dead(self) -> str | None:
        code = self._process.poll()
        if code is None:
            return None
        return f"the engine process {self._process.pid} is gone ({_exit_words(code)}); start a new Engine"

    def _stop_process(self, grace_s: float) -> None:
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        try:
            self._process.wait(timeout=grace_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _exit_words(code: int) -> str:
    return f"killed by signal {-code}" if code < 0 else f"exit code {code}"


def _child_environment(config: EngineConfig) -> dict[str, str]:
    environment = dict(os.environ)
    if config.num_threads is not None:
        environment["OMP_NUM_THREADS"] = str(config.num_threads)
    return environment
