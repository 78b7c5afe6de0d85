"""Token embedding and output head, split over the ranks by vocabulary.

T tokens, R rows to sample from, V vocabulary, E hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from weight_sync.layout.weight_map import Placement

from .linear import Product, project
from .shards import split_vocabulary
from .single_group import TensorParallelGroup


class VocabParallelEmbedding(nn.Module):
    """Rows of this rank's part of the vocabulary; where it does not divide, padded with rows that nothing reads."""

    def __init__(self, vocab_size: int, hidden_size: int, tp: TensorParallelGroup) -> None:
        super().__init__()
        self.product: Product = project
        self.tp = tp
        self.vocab_size = vocab_size
        self.start, self.num_tokens, rows = split_vocabulary(vocab_size, tp)
        self.weight = nn.Parameter(torch.empty(rows, hidden_size), requires_grad=False)

    def forward(self, token_ids: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """token_ids (T) -> out (T, E)."""
        if self.tp.size == 1:
            return torch.index_select(self.weight, 0, token_ids, out=out)
        local = token_ids - self.start
        foreign = (local < 0) | (local >= self.num_tokens)
        torch.index_select(self.weight, 0, local.masked_fill_(foreign, 0), out=out)
        return self.tp.all_reduce(out.masked_fill_(foreign[:, None], 0))

    def logits(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """hidden (R, E) -> logits (R, V) in the parameters' dtype, of the full vocabulary on every rank; into `out`."""
        if self.tp.size == 1:
            return self.product(hidden, self.weight, None, out)
        parts = self.tp.all_gather(self.product(hidden, self.weight)[None], dim=0)
        if out is None:
            out = hidden.new_empty((hidden.shape[0], self.vocab_size))
        rows = self.weight.shape[0]
        for part, place in zip(parts, out.split(rows, dim=1), strict=False):
            place.copy_(part[:, : place.shape[1]])
        return out

    def placements(self, prefix: str) -> Iterator[Placement]:
        """The rows of `prefix.weight` that are real tokens, all columns; nothing where this rank has only padding."""
        if self.num_tokens > 0:
            columns = self.weight.shape[1]
            yield Placement(
                name=f"{prefix}.weight",
                shape=(self.vocab_size, columns),
                region=((self.start, self.start + self.num_tokens), (0, columns)),
                destination=self.weight[: self.num_tokens],
            )


class ParallelLMHead(VocabParallelEmbedding):
    """The output head where it is not the embedding itself; the same rows, used for `logits` alone."""
