"""Weights without an engine: a process that holds them, receives updates, and never has a step to compute."""

from __future__ import annotations

import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

from weight_sync.layout.weight_map import WeightMap
from weight_sync.receiver.receiver import WeightReceiver
from weight_sync.receiver.service import WeightService
from weight_sync.wire.messages import WeightRequest
from weight_sync.wire.rpc import RpcServer

T = TypeVar("T")


class IdleLoop:
    """A `WeightHost` whose loop has no steps to compute."""

    named: Callable[[str], AbstractContextManager[Any]] = nullcontext

    def __init__(self) -> None:
        self._actions: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="idle-loop", daemon=True).start()

    def _run(self) -> None:
        while True:
            self._actions.get()()

    def between_steps(
        self, action: Callable[[], T], timeout_s: float, name: str | None = None
    ) -> T:
        """On the loop's thread, as in an engine."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(action())
            except BaseException as error:
                future.set_exception(error)

        self._actions.put(run)
        return future.result(timeout_s)

    def forgo(self, name: str) -> None:
        """Its actions run at once."""

    def unwritable(self) -> str | None:
        """It always can."""
        return None

    def reading(self) -> AbstractContextManager[None]:
        """Nothing is ever given back."""
        return nullcontext()

    def lend_kv_cache(self) -> None:
        """There is none."""

    def return_kv_cache(self) -> None:
        """There is none."""

    def weights_written(self, version: int, label: str | None, kv_policy: str | None) -> None:
        """There is nothing to refresh."""

    def label_changed(self, label: str) -> None:
        """Nobody asks for it."""

    def hold_outputs(self) -> None:
        """There are no outputs."""

    def release_outputs(self, ok: bool) -> None:
        """There are no outputs."""

    def weights_torn(self, reason: str, version: int, label: str) -> None:
        """Nobody generates."""


def serve(weight_map: WeightMap) -> None:
    """Receive updates of these parameters; prints the address, and returns when standard input has ended."""
    service = WeightService(WeightReceiver(weight_map, IdleLoop()))
    server = RpcServer(service.handle, WeightRequest)
    server.start()
    print(server.address, flush=True)
    sys.stdin.read()
    server.close()
    service.close()


@contextmanager
def served(module: str, *arguments: object) -> Iterator[str]:
    """The address of a process that runs `module` of this package, which calls `serve`; ended at the exit."""
    process = subprocess.Popen(
        [sys.executable, "-m", f"{__package__}.{module}", *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        address = process.stdout.readline().strip()
        if not address:
            raise RuntimeError(f"the process of {module} ended; its messages are above")
        yield address
    finally:
        process.stdin.close()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
