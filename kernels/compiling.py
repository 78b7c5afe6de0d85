"""Kernels compiled side by side, before a step needs them.

A step launches a dozen kernels one after the other, and the first launch of each waits a second for the compiler. So a
step is run without its kernels first: every launch hands its kernel to threads that compile (nearly all of that is done
without Python's lock), and the step goes on.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

from .launching import triton

_COMPILERS = 16
"""Threads at most."""
_turn = threading.RLock()
"""Who compiles ahead: two at a time would each put back what the other one had put there."""


@contextmanager
def compile_ahead() -> Iterator[None]:
    """Inside, launches on this thread compile on other threads and launch nothing; at the end all are compiled.

    What kernels would have written is left as it was allocated, so everything that is computed inside is to be thrown
    away, and nothing may take it for an index. Launches of other threads are launches; a thread that is to compile
    ahead too waits for its turn. A kernel that cannot be compiled raises at the end what the compiler raised.
    """
    with _turn:
        yield from _compiling_ahead()


def _compiling_ahead() -> Iterator[None]:
    launch, owner = triton.JITFunction.run, threading.get_ident()
    handed: set[Any] = set()

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        if threading.get_ident() != owner:
            return launch(kernel, *args, grid=grid, warmup=warmup, **options)
        what = (kernel, _kinds(args), _kinds(sorted(options.items())))
        if what not in handed:  # Layers launch alike.
            handed.add(what)
            launch(kernel, *args, grid=grid, warmup=True, **options)
        return None

    with _Compilers() as pool:
        with triton.AsyncCompileMode(pool):
            triton.JITFunction.run = compile_only
            try:
                yield
            finally:
                triton.JITFunction.run = launch


class _Compilers(Executor):
    """Threads that compile a kernel and do what its first launch would wait for: make a launcher, for which some
    releases of triton call a C compiler, and load the kernel onto the device."""

    def __init__(self) -> None:
        threads = min(_COMPILERS, os.cpu_count() or 1)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="compile")

    def submit(self, compile_kernel: Callable[[], Any], /) -> Future[Any]:  # type: ignore[override]
        # The launch's own: an engine of this process may be on another GPU than the one that is current here.
        device = torch.cuda.current_device() if torch.cuda.is_available() else None
        return self._pool.submit(self._make_ready, compile_kernel, device)

    @staticmethod
    def _make_ready(compile_kernel: Callable[[], Any], device: int | None) -> Any:
        kernel = compile_kernel()
        if device is not None:
            with torch.cuda.device(device):
                _ = kernel.run  # a property, which does both
        return kernel

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._pool.shutdown(wait, cancel_futures=cancel_futures)


def _kinds(value: Any) -> Any:
    """All of an argument that a kernel may be specialised for, and what can be hashed."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.data_ptr() % 16
    if isinstance(value, tuple | list):
        return tuple(map(_kinds, value))
    if (base := getattr(value, "base", None)) is not None:  # A tensor's descriptor.
        return _kinds(base), tuple(value.block_shape), tuple(value.shape), tuple(value.strides)
    return type(value), value
