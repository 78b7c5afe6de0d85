"""Kernels compiled side by side, before a step needs them.

A step launches a dozen kernels one after the other, and the first launch of each waits a second for the compiler. So a
step is run without its kernels first: every launch hands its kernel to threads that compile (nearly all of that is done
without Python's lock), and the step goes on.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

from .launching import triton

_COMPILERS = 16
"""Threads at most."""


@contextmanager
def compile_ahead() -> Iterator[None]:
    """Inside, launches on this thread compile on other threads and launch nothing; at the end all are compiled.

    What kernels would have written is left as it was allocated, so everything that is computed inside is to be thrown
    away, and nothing may take it for an index. Launches of other threads are launches. A kernel that cannot be compiled
    raises at the end what the compiler raised.
    """
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

    threads = min(_COMPILERS, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads, thread_name_prefix="compile") as pool:
        with triton.AsyncCompileMode(pool):
            triton.JITFunction.run = compile_only
            try:
                yield
            finally:
                triton.JITFunction.run = launch


def _kinds(value: Any) -> Any:
    """All of an argument that a kernel may be specialised for, and what can be hashed."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.data_ptr() % 16
    if isinstance(value, tuple | list):
        return tuple(map(_kinds, value))
    if (base := getattr(value, "base", None)) is not None:  # A tensor's descriptor.
        return _kinds(base), tuple(value.block_shape), tuple(value.shape), tuple(value.strides)
    return type(value), value
