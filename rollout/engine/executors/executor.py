"""Where the engine loop runs: a thread of this process ("inline"), child processes ("local"), or Ray actors ("ray").

An executor takes commands and gives futures. It decides where the loop runs and never what it does, so everything
above it is the same for all of them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol

from weight_sync.wire.channel import Channel
from weight_sync.wire.local_call import LocalCall
from weight_sync.wire.rpc import RpcServer

from ...config import EngineConfig
from ...protocol.wire import REQUEST_TYPES
from ..loop.build import build_core

OnChunk = Callable[[Any], None]


class Executor(Protocol):
    """Carries commands to an engine loop."""

    def submit(
        self, body: Any, *, timeout_s: float, on_chunk: OnChunk | None = None
    ) -> Future[Any]:
        """Send a command; `on_chunk` sees intermediate answers, on another thread, and must be quick."""
        ...

    def weight_channel(self) -> Channel:
        """The way for weight messages and, in the same process, for tensors."""
        ...

    @property
    def address(self) -> str:
        """Where trainers and clients in other processes connect."""
        ...

    def close(self) -> None:
        """End the loop and give back everything it holds; safe to call twice."""
        ...


class InlineExecutor:
    """Runs the loop on a thread of this process; the socket for other processes opens when it is first asked for, or at
    once where the configuration says where."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._core = build_core(config)
        self._server: RpcServer | None = None
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._core.run, name="rollout-engine", daemon=True)
        self._thread.start()
        if config.listen is not None:
            try:
                _ = self.address
            except BaseException:
                self.close()
                raise

    def submit(
        self, body: Any, *, timeout_s: float, on_chunk: OnChunk | None = None
    ) -> Future[Any]:
        call = LocalCall(body, time.monotonic() + timeout_s, on_chunk)
        self._core.submit(call)
        return call.future

    def weight_channel(self) -> Channel:
        return self._core.local_channel()

    @property
    def address(self) -> str:
        with self._lock:
            if self._server is None:
                self._server = RpcServer(
                    self._core.submit,
                    REQUEST_TYPES,
                    bind=self._config.listen,
                    insecure=self._config.insecure,
                    on_failure=self._core.give_up,
                )
                self._server.start()
            return self._server.address

    def close(self) -> None:
        from ...protocol.commands import Shutdown

        if self._thread.is_alive():
            self.submit(Shutdown(), timeout_s=30.0)
            self._thread.join(timeout=30.0)
        with self._lock:
            if self._server is not None:
                self._server.close()
                self._server = None
