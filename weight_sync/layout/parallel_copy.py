"""Copies of many tensors, shared among threads that wait for each other once.

torch shares each large copy among its threads and waits for all of them before it begins the next one. That is one wait
per tensor, and where anything else wants the processors, such as an engine that generates meanwhile, each of them may
last as long as the scheduler pleases. Here threads take pieces, small tensors many at a time, until none is left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from operator import attrgetter

import numpy as np
import torch

_PIECE_BYTES = 4 << 20
_THREADED_BYTES = 8 << 20
"""Below this a second thread costs more than it gains."""
_SMALL_ELEMENTS = 1 << 15
"""Up to here torch copies on the calling thread alone."""
_GROUP = 512
"""Small tensors that are one piece."""

_IS_CUDA = attrgetter("is_cuda")

Task = Callable[[], None]


@torch.no_grad()
def copy_tensors(destinations: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    """`destination.copy_(source)` for all pairs; dtypes, strides and devices may differ.

    Returns when all is copied, or issued where both are on a GPU.
    """
    if not destinations:
        return
    from_gpu = any(map(_IS_CUDA, sources))
    if not destinations[0].is_cuda and from_gpu:
        _download(destinations, sources)
        return
    threads, sizes = torch.get_num_threads(), list(map(torch.Tensor.numel, destinations))
    on_gpu = from_gpu or destinations[0].is_cuda
    num_bytes = sum(sizes) * destinations[0].element_size()
    if on_gpu or threads == 1 or num_bytes < _THREADED_BYTES:
        torch._foreach_copy_(destinations, sources)
        return
    others: list[tuple[torch.Tensor, torch.Tensor]] = []
    _share(iter(list(_tasks(destinations, sources, sizes, others))), threads)
    if others:
        torch._foreach_copy_([to for to, _ in others], [source for _, source in others])


def _download(destinations: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    """From GPUs, one copy behind the other and none of them waited for before the last."""
    for destination, source in zip(destinations, sources, strict=True):
        destination.copy_(source, non_blocking=True)
    for device in {source.device for source in sources if source.is_cuda}:
        torch.cuda.current_stream(device).synchronize()


def _tasks(
    destinations: Sequence[torch.Tensor],
    sources: Sequence[torch.Tensor],
    sizes: Sequence[int],
    others: list[tuple[torch.Tensor, torch.Tensor]],
) -> Iterator[Task]:
    """Pieces for any thread; large tensors that are no plain bytes go to `others`, which torch shares out itself."""
    small = [i for i, size in enumerate(sizes) if size <= _SMALL_ELEMENTS]
    large = [i for i, size in enumerate(sizes) if size > _SMALL_ELEMENTS]
    for i in large:
        if _is_plain(destinations[i], sources[i]):
            yield from _pieces(_as_bytes(destinations[i]), _as_bytes(sources[i]))
        else:
            others.append((destinations[i], sources[i]))
    for first in range(0, len(small), _GROUP):
        group = small[first : first + _GROUP]
        yield partial(copy_group, [destinations[i] for i in group], [sources[i] for i in group])


def _is_plain(destination: torch.Tensor, source: torch.Tensor) -> bool:
    """Contiguous bytes of this machine's memory on both sides, with the same meaning."""
    return (
        destination.dtype == source.dtype
        and destination.device.type == source.device.type == "cpu"
        and destination.is_contiguous()
        and source.is_contiguous()
    )


def _as_bytes(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().view(-1).view(torch.uint8).numpy()


def _pieces(destination: np.ndarray, source: np.ndarray) -> Iterator[Task]:
    for first in range(0, len(source), _PIECE_BYTES):
        part = slice(first, first + _PIECE_BYTES)
        yield partial(np.copyto, destination[part], source[part])


def copy_group(destinations: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    """One call of torch's for all, which does without the interpreter's lock; for any thread."""
    with torch.no_grad():  # a thread has a mode of its own
        torch._foreach_copy_(destinations, sources)


def _share(tasks: Iterator[Task], threads: int) -> None:
    def work() -> None:
        for task in (
            tasks
        ):  # shared: each thread takes the next one; all of them let go of the interpreter lock
            task()

    with ThreadPoolExecutor(threads - 1, thread_name_prefix="copy") as pool:
        helpers = [pool.submit(work) for _ in range(threads - 1)]
        work()
        for helper in helpers:
            helper.result()
