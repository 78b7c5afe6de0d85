"""Drawing from a distribution with a number that depends on the request alone.

Shapes: B rows, V vocabulary, C chunks of S columns.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .logprobs import chunk_size
from .selection import chunk_columns


def uniforms(seeds: NDArray[np.uint64], positions: NDArray[np.int64]) -> NDArray[np.float64]:
    """One number in [0, 1) per row, a hash of the request's seed and the position of the token in its output.

    Independent of the batch, the step, and the rank. 53 random bits each.
    """
    mixed = _mix64(_mix64(seeds) + positions.astype(np.uint64))
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix64(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """`sampling_params.mix64` of an array."""
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def draw(weights: Tensor, sums: Tensor, uniform: Tensor) -> Tensor:
    """(B, V) weights >= 0, (B, C) their chunk sums, (B,) numbers in [0, 1) -> (B,) columns: the inverse of the
    cumulative distribution, that is the first column whose cumulative weight exceeds `uniform` of the whole.

    Two levels, both summed in float64: first the chunk, then the column in it. A column of weight 0 is never drawn.
    Rows must have a positive, finite sum; what is returned for others is some column.
    """
    num_columns, size = weights.shape[1], chunk_size(weights.shape[1])
    running = sums.cumsum(-1, dtype=torch.float64)
    # A float64 below 1 times the total is below the total, also after rounding: some chunk is always found.
    target = uniform.to(running.device).unsqueeze(1) * running[:, -1:]
    chunk = torch.searchsorted(running, target, right=True).clamp_(max=sums.shape[1] - 1)
    before = torch.where(chunk > 0, running.gather(1, (chunk - 1).clamp_(min=0)), 0.0)
    # A shorter last chunk is filled up with its last column; only rounding reaches these, and they mean that column.
    columns = chunk_columns(chunk, size).squeeze(1).clamp_(max=num_columns - 1)
    cumulative = weights.gather(1, columns).cumsum(-1, dtype=torch.float64)
    # A chunk's sum in float32 may exceed the one in float64 here: then it is the chunk's last possible column.
    whole = cumulative[:, -1:]
    below = torch.nextafter(whole, torch.zeros_like(whole))
    offset = torch.searchsorted(cumulative, torch.minimum(target - before, below), right=True)
    return columns.gather(1, offset.clamp_(max=size - 1)).squeeze(1)
