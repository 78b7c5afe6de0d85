"""What a layer asks of its tensor-parallel group, and the group of one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


class RankOfMany(Protocol):
    """One of some ranks: what splitting sizes needs to know."""

    @property
    def rank(self) -> int:
        """This rank's position, from 0."""

    @property
    def size(self) -> int:
        """Number of ranks."""


class TensorParallelGroup(RankOfMany, Protocol):
    """The ranks that hold one model together; every rank calls the same collectives in the same order."""

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of `tensor` over the ranks; may be written in place."""

    def all_gather(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """The ranks' tensors, of equal shapes, side by side along `dim` in rank order."""


@dataclass(frozen=True, slots=True)
class SingleGroup:
    """One rank that holds the whole model; its collectives are the identity."""

    rank: int = 0
    """Always 0."""
    size: int = 1
    """Always 1."""

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` itself."""
        return tensor

    def all_gather(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """`tensor` itself."""
        return tensor
