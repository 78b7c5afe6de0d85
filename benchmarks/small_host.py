"""A process that holds many small tensors and receives updates: `python -m rollout_benchmarks.small_host NUM SIZE`.

No model family consists of 20,000 tensors, so there is no engine here: the same `WeightReceiver` and `WeightService`
that live in an engine, over parameters in one arena, and a loop thread that is always between two steps. Prints its
address; ends with its standard input.
"""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch

from weight_sync.layout.manifest import Manifest, TensorMeta
from weight_sync.layout.weight_map import Placement, WeightMap
from weight_sync.receiver.receiver import WeightReceiver
from weight_sync.receiver.service import WeightService
from weight_sync.wire.messages import WeightRequest
from weight_sync.wire.rpc import RpcServer

T = TypeVar("T")


def tensor_name(i: int) -> str:
    """Name of tensor `i`, of a length that is usual in large models."""
    return f"model.layers.{i // 384}.mlp.experts.{i // 3 % 128}.part_{i % 3}.weight"


def small_map(num_tensors: int, size: int) -> WeightMap:
    """`num_tensors` bfloat16 tensors (size, size), side by side in one arena."""
    metas = tuple(
        TensorMeta(name=tensor_name(i), shape=(size, size), dtype=torch.bfloat16)
        for i in range(num_tensors)
    )
    manifest = Manifest(tensors=metas, bucket_bytes=512 << 20)
    views = manifest.views(torch.zeros(manifest.arena_bytes, dtype=torch.uint8))
    parameters = {meta.name: view for meta, view in zip(metas, views, strict=True)}
    return WeightMap([Placement.whole(name, view) for name, view in parameters.items()], parameters)


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

    def weights_torn(self, reason: str) -> None:
        """Nobody generates."""


def main(arguments: list[str]) -> int:
    """Serve until standard input ends."""
    num_tensors, size = map(int, arguments)
    service = WeightService(WeightReceiver(small_map(num_tensors, size), IdleLoop()))
    request_types: Any = WeightRequest
    server = RpcServer(service.handle, request_types)
    server.start()
    sys.stdout.write(server.address + "\n")
    sys.stdout.flush()
    sys.stdin.read()
    server.close()
    service.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
