"""Largest elements of long rows, by way of the maxima of short chunks.

A chunk that is not among the k chunks with the largest maxima holds nothing that belongs to the k largest elements, so
one cheap pass over the row is followed by work on a few chunks. Exact, and several times faster on a CPU than
`argmax` and `topk` over a vocabulary.

Shapes: R rows, V columns, C chunks of S columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 64
"""Columns of a chunk here; the sampler's chunks are its own."""


def chunk_sums(values: Tensor, size: int) -> Tensor:
    """(R, V) -> (R, C): sums of `size` neighbouring columns; the last chunk may be shorter."""
    whole, rest = _split(values, size)
    sums = whole.sum(-1)
    return torch.cat([sums, rest.sum(-1, keepdim=True)], -1) if rest.shape[-1] else sums


def chunk_maxima(values: Tensor, size: int) -> Tensor:
    """(R, V) -> (R, C): maxima of `size` neighbouring columns; the last chunk may be shorter."""
    whole, rest = _split(values, size)
    maxima = whole.amax(-1)
    return torch.cat([maxima, rest.amax(-1, keepdim=True)], -1) if rest.shape[-1] else maxima


def _split(values: Tensor, size: int) -> tuple[Tensor, Tensor]:
    num_columns = values.shape[1]
    end = num_columns // size * size
    return values[:, :end].unflatten(1, (end // size, size)), values[:, end:]


def chunk_columns(chunks: Tensor, size: int) -> Tensor:
    """(R, K) chunk numbers -> (R, K, S) column numbers, which exceed V where the last chunk is shorter."""
    return chunks.unsqueeze(-1) * size + torch.arange(size, device=chunks.device)


def argmax(values: Tensor) -> Tensor:
    """(R, V) -> (R,): the first column that holds the row's maximum; a NaN counts as the maximum."""
    if values.shape[1] < 4 * CHUNK:
        return values.argmax(-1)
    chunk = chunk_maxima(values, CHUNK).argmax(-1, keepdim=True)
    columns = chunk_columns(chunk, CHUNK).squeeze(1).clamp_(max=values.shape[1] - 1)
    return columns.gather(1, values.gather(1, columns).argmax(-1, keepdim=True)).squeeze(1)


def largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(R, V) -> (R, k) values, descending, and their columns; equal values are in no particular order."""
    num_columns = values.shape[1]
    k = min(k, num_columns)
    num_chunks = -(-num_columns // CHUNK)
    if 4 * k >= num_chunks:
        return values.topk(k, dim=-1)
    chunks = chunk_maxima(values, CHUNK).topk(k, dim=-1, sorted=False).indices
    columns = chunk_columns(chunks, CHUNK).flatten(1)
    beyond = columns >= num_columns
    candidates = values.gather(1, columns.clamp_(max=num_columns - 1))
    candidates.masked_fill_(beyond, float("-inf"))
    found, where = candidates.topk(k, dim=-1)
    return found, columns.gather(1, where)
