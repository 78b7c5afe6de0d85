"""Whether many tensors are laid out as others were: one call of torch's own for all of them, where it has one.

Compiled functions of torch look at all their inputs so, in C++: type, dtype, device, shape, strides, and whatever else
decides how a tensor is dispatched. It is not public, so it is believed only where it answers a few questions rightly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch

Guard = Callable[..., bool]


def guard_of(tensors: Sequence[torch.Tensor]) -> Guard | None:
    """A function that says of so many tensors, as arguments, whether each is laid out as the one in its place; None
    where torch has no such thing. It keeps none of `tensors`, and says no where it is called in another mode (of
    gradients, say)."""
    make = _guards()
    return None if make is None else _guard(make, tensors)


def _guard(make: Any, tensors: Sequence[torch.Tensor]) -> Guard:
    found: Guard = make(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
    return found


@cache
def _guards() -> Any:
    try:
        from torch._C._dynamo.guards import TensorGuards

        check = _guard(TensorGuards, [torch.zeros(2, 3), torch.zeros(4)])
        others = (
            *(torch.zeros(3, 2), torch.zeros(6), torch.zeros(2, 3, 1), torch.zeros(3, 2).t()),
            *(torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, 3, device="meta")),
            *(torch.zeros(2, 3).to_sparse(), torch.nn.Parameter(torch.zeros(2, 3))),
        )
        same = check(torch.ones(2, 3), torch.ones(4))
        return TensorGuards if same and not any(check(o, torch.ones(4)) for o in others) else None
    except Exception:  # whatever a release of torch has made of it
        return None
