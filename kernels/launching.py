"""Triton, where it is installed, and how its kernels are launched.

Files of kernels import `triton`, `tl` and `jit` from here, so that they can be imported, and their torch references
used, where there is no triton.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
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


def next_power_of_two(value: int) -> int:
    """The least power of two that is at least `value`."""
    return 1 << max(0, value - 1).bit_length()
