"""top-k, top-p and min-p, each as a lower bound on the probability of what may be drawn.

Order: top-k first; top-p over what it left, renormalised; min-p relative to the most likely token. All three are
bounds, so a row is filtered by comparing it with the largest of them. Tokens that are exactly as likely as the last one
that is kept are kept too: which of equals goes would otherwise depend on the order of a sort.

Shapes: B rows, V vocabulary, K most likely tokens.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .draw import draw
from .logprobs import chunk_size
from .selection import chunk_sums, largest

_NUCLEUS_GUESS = 256
"""Tokens looked at first for top-p; a row whose nucleus is larger is sorted."""
_SORT_COLUMNS = 16384
"""Rows of up to so many columns are sorted at once when many of their values are wanted."""


def lower_bounds(probabilities: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """(B, V) probabilities -> (B,) bounds; (B,) top_k (V or more: all), float64 top_p (1: all), min_p (0: all)."""
    bounds = min_p * probabilities.amax(-1)
    limited = top_k < probabilities.shape[1]
    if limited.any():
        rows = limited.nonzero().squeeze(1)
        some = probabilities if limited.all() else probabilities[rows]
        bounds[rows] = torch.maximum(bounds[rows], _bounds_of_k(some, top_k[rows], top_p[rows]))
    nucleus = ~limited & (top_p < 1.0)
    if nucleus.any():
        rows = nucleus.nonzero().squeeze(1)
        some = probabilities if nucleus.all() else probabilities[rows]
        bounds[rows] = torch.maximum(bounds[rows], _bounds_of_p(some, top_p[rows]))
    return bounds


def _bounds_of_k(probabilities: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    head = _most_likely(probabilities, int(top_k.max()))
    ranks = torch.arange(head.shape[1], device=head.device)
    # What lies behind a row's own k is another row's.
    head = head.masked_fill(ranks >= top_k.unsqueeze(1), 0.0)
    num_kept = torch.minimum(_num_in_nucleus(head, top_p * head.sum(-1)), top_k)
    num_kept = torch.where(top_p < 1.0, num_kept, top_k)
    return head.gather(1, num_kept.unsqueeze(1) - 1).squeeze(1)


def _bounds_of_p(probabilities: Tensor, top_p: Tensor) -> Tensor:
    mass = top_p * probabilities.sum(-1, dtype=torch.float64)
    head = _most_likely(probabilities, min(_NUCLEUS_GUESS, probabilities.shape[1]))
    num_kept = _num_in_nucleus(head, mass)
    bounds = head.gather(1, num_kept.unsqueeze(1) - 1).squeeze(1)
    larger = head.sum(-1, dtype=torch.float64) < mass
    if larger.any() and head.shape[1] < probabilities.shape[1]:
        rows = larger.nonzero().squeeze(1)
        some = probabilities if larger.all() else probabilities[rows]
        # From the other end: the first that is kept is where the least likely exceed what may be left out.
        ascending = _ascending(some)
        sums = chunk_sums(ascending, chunk_size(ascending.shape[1]))
        first = draw(ascending, sums, 1.0 - top_p[rows])
        bounds[rows] = ascending.gather(1, first.unsqueeze(1)).squeeze(1)
    return bounds


def _num_in_nucleus(head: Tensor, mass: Tensor) -> Tensor:
    """(B, K) descending probabilities, (B,) -> how many of the first it takes to reach `mass`; at least one."""
    before = head.cumsum(-1, dtype=torch.float64) - head
    return (before < mass.unsqueeze(1)).sum(-1).clamp_(min=1)


def _most_likely(probabilities: Tensor, k: int) -> Tensor:
    """(B, V) -> (B, K >= k) largest probabilities, descending."""
    num_columns = probabilities.shape[1]
    if k > num_columns // 16 or (k > 64 and num_columns <= _SORT_COLUMNS):
        return _ascending(probabilities).flip(-1)
    return largest(probabilities, k)[0]


def _ascending(probabilities: Tensor) -> Tensor:
    if probabilities.device.type != "cpu":
        return probabilities.sort(-1).values
    # numpy sorts float32 several times faster than torch, which carries the columns along.
    return torch.from_numpy(np.sort(probabilities.numpy(), axis=-1))
