"""Which part of a checkpoint tensor a rank holds, and the arithmetic of splitting sizes over ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from weight_sync.layout.weight_map import Placement

from ..errors import ConfigError
from .single_group import RankOfMany


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputRows:
    """One output of a fused projection: the rows of its checkpoint matrix that this rank computes."""

    name: str
    """Module name in the checkpoint, such as "q_proj"."""
    full: int
    """Rows of the whole matrix."""
    start: int
    """First row of this rank."""
    size: int
    """Number of rows of this rank."""

    def placements(self, prefix: str, kind: str, destination: torch.Tensor) -> Iterator[Placement]:
        """The part of `prefix.name.kind`, all of its columns, that `destination` holds; nothing when that is empty."""
        if self.size > 0:
            columns = tuple(destination.shape[1:])
            yield Placement(
                name=f"{prefix}.{self.name}.{kind}",
                shape=(self.full, *columns),
                region=((self.start, self.start + self.size), *((0, size) for size in columns)),
                destination=destination,
            )


def split_evenly(what: str, size: int, tp: RankOfMany) -> tuple[int, int]:
    """First index and length of this rank's part of `size`; `ConfigError` when it does not divide."""
    if size % tp.size:
        raise ConfigError(
            f"cannot split {what} over tensor-parallel ranks: got {size} over {tp.size} ranks, "
            f"expected a multiple of {tp.size}; choose a tp_size that divides {size}"
        )
    part = size // tp.size
    return part * tp.rank, part


def split_kv_heads(num_kv_heads: int, tp: RankOfMany) -> tuple[int, int]:
    """First KV head and number of them on this rank; with more ranks than heads, neighbours hold the same head."""
    if tp.size <= num_kv_heads:
        return split_evenly("num_key_value_heads", num_kv_heads, tp)
    if tp.size % num_kv_heads:
        raise ConfigError(
            f"cannot replicate KV heads over tensor-parallel ranks: got {num_kv_heads} heads on {tp.size} "
            f"ranks, expected a tp_size that divides {num_kv_heads} or is a multiple of it; choose such a one"
        )
    return tp.rank * num_kv_heads // tp.size, 1


def split_vocabulary(vocab_size: int, tp: RankOfMany) -> tuple[int, int, int]:
    """First token, number of real tokens, and number of rows with padding, of this rank's part of the vocabulary."""
    rows = -(-vocab_size // tp.size)
    start = min(rows * tp.rank, vocab_size)
    return start, min(rows, vocab_size - start), rows
