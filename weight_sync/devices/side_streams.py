"""Streams beside the one on which generation runs, one for each purpose; and on which GPU and streams threads work."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch


@lru_cache(maxsize=64)
def side_stream(device: torch.device, purpose: str) -> torch.cuda.Stream | None:
    """This process's stream on `device` for `purpose`, the same at every call; None where `device` is no GPU.

    Torch's allocator keeps what it once took for the stream that it took it for, and torch hands out 32 streams in
    turn: a new one for each update would keep the temporary memory of an update 32 times.
    """
    return torch.cuda.Stream(device) if device.type == "cuda" else None


def work_on(device: torch.device) -> None:
    """Make `device` this thread's current GPU, if it is one.

    A thread begins with the first GPU. What then leaves a side stream of another one goes back to the first, and that
    takes some of its memory for this process: since CUDA 12 whoever chooses a GPU gets a context on it.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)


def as_here() -> Callable[[], None]:
    """Call the answer on another thread: what that asks of GPUs goes where it would from here, behind all that this
    thread has asked for. The current GPU is each thread's own, and so are the current streams."""
    if not torch.cuda.is_initialized():
        return lambda: None
    gpu = torch.cuda.current_device()
    streams = [
        stream
        for i in range(torch.cuda.device_count())
        if (stream := torch.cuda.current_stream(i)) != torch.cuda.default_stream(i)
    ]

    def use() -> None:
        for stream in streams:
            torch.cuda.set_stream(stream)  # and its GPU
        torch.cuda.set_device(gpu)

    return use
