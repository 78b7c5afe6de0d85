"""Triton, where it is installed, and how its kernels are launched.

Files of kernels import `triton`, `tl` and `jit` from here, so that they can be imported, and their torch references
used, where there is no triton.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache, partial
from typing import Any

import torch

try:  # optional: only tensors on CUDA need it
    import triton
    import triton.language as tl
except ImportError:  # pragma: no cover
    triton = None
    tl = None


def jit(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """`triton.jit`; without triton, the function as it is, which nobody can call."""
    if function is None:
        return lambda later: jit(later, **options)
    if triton is None:
        return function
    made = triton.jit(function, **options)
    if isinstance(made, triton.JITFunction):  # the interpreter compiles nothing
        made.run = partial(_launch_or_compile, made.run)
    return made


_this_thread = threading.local()


def _launch_or_compile(run: Callable[..., Any], *args: Any, warmup: bool, **options: Any) -> Any:
    compiled: set[Any] | None = getattr(_this_thread, "compiled", None)
    if compiled is None:
        return run(*args, warmup=warmup, **options)
    kinds = [(name, _kind(value)) for name, value in options.items() if name != "grid"]
    key = (id(run), *map(_kind, args), *kinds)
    if key in compiled:  # mostly: layers are alike, and triton would take its time to find that out
        return None
    compiled.add(key)
    return run(*args, warmup=True, **options)


def _kind(value: Any) -> Any:
    """What a kernel is compiled for, or more than that; hashable."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.data_ptr() % 16
    if isinstance(value, tuple):
        return tuple(map(_kind, value))
    try:
        hash(value)
    except TypeError:  # a descriptor of a tensor
        return type(value), tuple(value.shape), tuple(value.block_shape), _kind(value.base)
    return value


@contextmanager
def only_compiling(executor: Executor) -> Iterator[None]:
    """Meanwhile this thread's launches compute nothing: their kernels are compiled, side by side by `executor`.

    All of them are compiled when it ends. A triton that cannot compile beside others does so one by one.
    """
    beside = getattr(triton, "AsyncCompileMode", None)
    _this_thread.compiled = set()
    try:
        with nullcontext() if beside is None else beside(executor):
            yield
    finally:
        _this_thread.compiled = None


def launching_on(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """The context in which a kernel over `tensor` is launched: triton takes the current device, whatever the tensors'.

    On the CPU, triton's interpreter runs the kernel, if it was chosen before triton was imported.
    """
    if triton is None:
        raise RuntimeError(
            f"cannot launch a kernel on {tensor.device}: got no triton, expected it on a machine "
            "with CUDA; install triton"
        )
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return nullcontext()


@jit
def take_turn():  # type: ignore[no-untyped-def]
    """The first thing that a chained kernel does: wait until the launch before it is done and its memory is visible,
    then let the launch after it be set up."""
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()


def chaining(tensor: torch.Tensor) -> dict[str, Any]:
    """Options of a launch over `tensor` whose kernel has a constexpr CHAINED and then calls `take_turn`.

    A chained launch is set up while the launch before it still runs, whatever that is; one that follows a chained one
    gains as much, if it is chained itself. On Hopper and later: 0.6 us a launch, in CUDA graphs too.
    """
    chained = tensor.is_cuda and _waits_in_kernels(tensor.device)
    return {"CHAINED": True, "launch_pdl": True} if chained else {"CHAINED": False}


@lru_cache(maxsize=16)
def _waits_in_kernels(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0)


def power_of_two_within(value: int) -> int:
    """The largest power of two that is at most `value`."""
    return 1 << (value.bit_length() - 1)


def next_power_of_two(value: int) -> int:
    """The least power of two that is at least `value`."""
    return 1 << max(0, value - 1).bit_length()
