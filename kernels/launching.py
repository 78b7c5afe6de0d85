"""Triton, where it is installed, and how its kernels are launched.

Files of kernels import `triton`, `tl` and `jit` from here, so that they can be imported, and their torch references
used, where there is no triton.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
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
    return function if triton is None else triton.jit(function, **options)


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


FEW_ROWS = 16
"""A step of up to so many rows is made of our kernels alone, products too where they have been measured."""


@jit
def take_turn():  # type: ignore[no-untyped-def]
    """What a chained kernel does before it touches what another launch writes, and before it writes: wait until the
    launch before it is done and its memory is visible, then let the launch after it be set up.

    In this order one launch waits at a time: in the other a dozen did, and took the room of the one that was to run.
    """
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()


def chaining(tensor: torch.Tensor, num_rows: int = 1) -> dict[str, Any]:
    """Options of a launch over `tensor` whose kernel has a constexpr CHAINED and then calls `take_turn`.

    A chained launch is set up while the launch before it still runs, whatever that is; one that follows a chained one
    gains as much, if it is chained itself. On Hopper and later, in CUDA graphs too. A launch over more than `FEW_ROWS`
    rows is not chained: the products before and behind it are cuBLAS's, which are not.
    """
    chained = num_rows <= FEW_ROWS and tensor.is_cuda and _waits_in_kernels(tensor.device)
    return {"CHAINED": True, "launch_pdl": True} if chained else {"CHAINED": False}


@lru_cache(maxsize=16)
def _waits_in_kernels(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0)


@lru_cache(maxsize=16)
def device_name(device: torch.device) -> str:
    """What shapes of launches are stored under; "default" for a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "default"


def power_of_two_within(value: int) -> int:
    """The largest power of two that is at most `value`."""
    return 1 << (value.bit_length() - 1)


def next_power_of_two(value: int) -> int:
    """The least power of two that is at least `value`."""
    return 1 << max(0, value - 1).bit_length()
