"""The head of a sequence classifier or reward model: a few scores instead of a vocabulary.

R rows, E hidden size, L labels.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from weight_sync.layout.weight_map import Placement

from .linear import project


class ScoreHead(nn.Module):
    """A projection without bias, whole on every rank: it is far too small to be worth a collective."""

    def __init__(self, num_labels: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_labels, hidden_size), requires_grad=False)

    def logits(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """hidden (R, E) -> (R, L) in the parameters' dtype; into `out`, if any."""
        scores = project(hidden, self.weight, None)
        return scores if out is None else out.copy_(scores)

    def placements(self, prefix: str) -> Iterator[Placement]:
        """The whole weight, on every rank."""
        rows, columns = self.weight.shape
        yield Placement(
            name=f"{prefix}.weight",
            shape=(rows, columns),
            region=((0, rows), (0, columns)),
            destination=self.weight,
        )
