"""What a layer asks of its tensor-parallel group, and the group of one."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
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

    def room(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor | None:
        """Memory where the tensor of the next `all_reduce` had better be; None: anywhere."""

    def muted(self) -> AbstractContextManager[None]:
        """Meanwhile collectives of this rank ask nobody, and give anything."""

    def all_gather(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """The ranks' tensors, of equal shapes, side by side along `dim` in rank order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankOf:
    """A rank and how many there are."""

    rank: int
    """From 0."""
    size: int
    """Number of ranks."""


def split_experts(tp: RankOfMany, ep_size: int) -> tuple[RankOf, RankOf]:
    """A tensor-parallel rank's place among those that own different experts, and among those that share the same ones.

    `tp.size` is a multiple of `ep_size`; ranks that share experts are neighbours.
    """
    sharing = tp.size // ep_size
    return RankOf(rank=tp.rank // sharing, size=ep_size), RankOf(
        rank=tp.rank % sharing, size=sharing
    )


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

    def room(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor | None:
        """None."""
        return None

    def muted(self) -> AbstractContextManager[None]:
        """Nothing changes."""
        return nullcontext()

    def all_gather(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """`tensor` itself."""
        return tensor
