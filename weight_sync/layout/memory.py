"""Where tensors are: allocations, byte ranges within them, and views of whole allocations."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable

import torch

Range = tuple[int, int]
"""First byte in an allocation or a buffer, and one past the last."""
Storage = tuple[torch.device, int]
"""What tells one allocation from another: its device, and torch's object for it, whatever its address is now."""


def joined(
    ranges: Iterable[Range], follows: Callable[[int, int], bool] = operator.eq
) -> list[Range]:
    """Ascending ranges in as few as there can be: `follows(end, start)` tells whether the next one goes on there."""
    found: list[Range] = []
    for first, last in ranges:
        if found and follows(found[-1][1], first):
            found[-1] = found[-1][0], max(last, found[-1][1])
        else:
            found.append((first, last))
    return found


def storage_key(tensor: torch.Tensor) -> Storage:
    """The allocation that `tensor` lies in."""
    return tensor.device, tensor.untyped_storage()._cdata


def byte_range(tensor: torch.Tensor) -> Range:
    """The bytes of a tensor that is not empty, in its allocation; strided ones have gaps."""
    shape_strides = zip(tensor.shape, tensor.stride(), strict=True)
    first, size = int(tensor.storage_offset()), tensor.element_size()
    last = first + sum((int(num) - 1) * int(stride) for num, stride in shape_strides)
    return first * size, (last + 1) * size


@torch.inference_mode(False)
def storage_view(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The whole allocation of `tensor` as elements of `dtype`, as many as fit; shares its memory."""
    storage = tensor.untyped_storage()
    view = torch.empty(0, dtype=dtype, device=tensor.device)
    return view.set_(storage, 0, (storage.nbytes() // dtype.itemsize,))  # type: ignore[call-overload]


@torch.inference_mode(False)
def writable(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as a tensor that may be written from any thread and grad mode, however `tensor` was made."""
    memory = storage_view(tensor, tensor.dtype)
    return memory.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
