"""What the scripts of this folder share: the tensors of a trainer, and a process group in which it is rank 0."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

Tensors = Mapping[str, torch.Tensor]
_TIMEOUT = timedelta(seconds=60)


def arguments(doc: str) -> tuple[str, dict[str, torch.Tensor]]:
    """The address of a server, and the tensors of a checkpoint that stand for a step of training."""
    parser = argparse.ArgumentParser(description=doc.partition("\n")[0])
    parser.add_argument("url", help="such as http://127.0.0.1:8000, of `rollout serve`")
    parser.add_argument("checkpoint", help="a folder with weights of the served model's shapes")
    given = parser.parse_args()
    return given.url.rstrip("/"), load(given.checkpoint)


def load(folder: str | Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors folder."""
    from safetensors.torch import load_file

    return {
        name: tensor
        for file in sorted(Path(folder).glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def described(tensors: Tensors) -> dict[str, Any]:
    """Names, dtypes and shapes of what will be broadcast."""
    return {
        "names": list(tensors),
        "dtypes": [str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()],
        "shapes": [list(tensor.shape) for tensor in tensors.values()],
    }


class Group:
    """Rank 0 of a group as `torch.distributed` trainers make it: a store of its own, prefixed with the group's name."""

    def __init__(self, name: str, world_size: int, backend: str = "gloo") -> None:
        if backend != "gloo":
            raise ValueError(f"backend: got {backend!r}; this script sends from a CPU, over gloo")
        self.name, self.world_size, self.backend = name, world_size, backend
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.port: int = self._store.port
        self._group: Any = None

    def meet(self) -> None:
        """Returns when the engines have come too: they must have been asked before."""
        store = dist.PrefixStore(self.name, self._store)
        self._group = dist.ProcessGroupGloo(store, 0, self.world_size, _TIMEOUT)

    def broadcast(self, tensors: Tensors) -> None:
        """Send them one after the other."""
        for tensor in tensors.values():
            self._group.broadcast(tensor.detach().contiguous(), 0).wait()


@contextmanager
def in_background() -> Iterator[Any]:
    """`start(call, ...)`: a request under way while the trainer broadcasts; its errors are raised at the end."""
    started: list[Future[Any]] = []
    with ThreadPoolExecutor() as pool:

        def start(call: Any, *given: Any, **named: Any) -> Future[Any]:
            started.append(pool.submit(call, *given, **named))
            return started[-1]

        yield start
        for future in started:
            future.result()
