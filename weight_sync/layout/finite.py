"""Whether tensors hold numbers alone: what a diverged trainer sends (NaN, infinities) must not replace what serves.

A sum is infinite or NaN when one of its terms is, and is read as fast as memory gives it. Finite terms may add up to
infinity, too, so a sum only says where to look closer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import numpy as np
import torch

from ..errors import NonFiniteWeightsError
from .manifest import Manifest

_MAX_NAMED = 20
_PIECE = 1 << 22
"""Elements that are looked at closely at once."""


class FiniteCheck:
    """The check of an arena that is laid out by `manifest`: neighbours of one dtype are read together."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        kinds = {dtype: i for i, dtype in enumerate({meta.dtype for meta in manifest.tensors})}
        self._kinds = np.array([kinds[meta.dtype] for meta in manifest.tensors], dtype=np.int64)

    @torch.no_grad()
    def check(self, buffer: torch.Tensor, rows: np.ndarray) -> None:
        """`NonFiniteWeightsError` that names those of the tensors `rows` (ascending) in `buffer` that are not "
        "finite."""
        manifest = self._manifest
        suspects: list[int] = []
        for run in self._runs(rows):
            last = manifest.tensors[run[-1]]
            dtype = last.dtype
            if not dtype.is_floating_point:
                continue
            start, stop = manifest.offsets[run[0]], manifest.offsets[run[-1]] + last.num_bytes
            if not is_surely_finite(buffer[start:stop].view(dtype)):  # with the padding between
                suspects += run.tolist()
        refuse_non_finite((manifest.tensors[i].name, manifest.view(buffer, i)) for i in suspects)

    def _runs(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        """Neighbours in the arena of one dtype."""
        if not len(rows):
            return
        breaks = (np.diff(rows) != 1) | (np.diff(self._kinds[rows]) != 0)
        yield from np.split(rows, np.flatnonzero(breaks) + 1)


@torch.no_grad()
def refuse_non_finite(named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """`NonFiniteWeightsError` that names the tensors with NaN or infinite values, and how many of them there are."""
    lines: list[str] = []
    num = 0
    for name, tensor in named_tensors:
        tensor = tensor.detach()
        if not tensor.is_floating_point() or is_surely_finite(tensor):
            continue
        wrong = sum(int((~torch.isfinite(part)).sum()) for part in _pieces(tensor))
        if wrong:
            num += 1
            if len(lines) < _MAX_NAMED:
                lines.append(f"{name}: {wrong} of {tensor.numel()} values are NaN or infinite")
    if num:
        if num > len(lines):
            lines.append(f"... and {num - len(lines)} more")
        raise NonFiniteWeightsError(
            f"{num} tensors are not finite, and nothing was written:\n  "
            + "\n  ".join(lines)
            + "\nthe trainer has diverged, or its tensors were not initialised; go back to a good step, or send them "
            "all the same with check_finite=False"
        )


def is_surely_finite(tensor: torch.Tensor) -> bool:
    """True only when all values are finite; False also where it takes a closer look."""
    if not tensor.numel():
        return True
    if tensor.dtype in (torch.float32, torch.bfloat16, torch.float64):
        return math.isfinite(float(tensor.sum()))
    if tensor.dtype is torch.float16:  # its sums overflow
        low, high = torch.aminmax(tensor)
        return math.isfinite(float(low)) and math.isfinite(float(high))
    return all(math.isfinite(float(part.sum())) for part in _pieces(tensor))


def _pieces(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The elements, some at a time, in a dtype that can be computed with."""
    for part in tensor.reshape(-1).split(_PIECE):
        yield part if part.element_size() > 1 else part.float()
