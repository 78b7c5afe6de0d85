"""How tensors are written down while they travel: one object that both ends know by its name, and no transport knows.

    trainer: tensors -> encode -> arena | transport: bytes of a manifest | stage -> decoder -> parameters

What travels for a tensor is a tensor too, of the same name and maybe another shape or dtype. So arenas, buckets, chunks
and their fingerprints are those of what travels, and a transport needs nothing new. The resident bytes are compared
with what the trainer says of the tensors themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from .manifest import Manifest, TensorMeta
from .parallel_copy import copy_tensors


class Encoding(Protocol):
    """Stateless, or with the state of one trainer or one rank alone."""

    name: str
    """What `Begin.encoding` says."""
    verbatim: bool
    """What travels is what is written: it may arrive in the memory from which it is written, and needs no decoder. Any
    other encoding is a `plan.decoding.Decoding` too."""

    def carried(self, meta: TensorMeta) -> TensorMeta:
        """What travels for a tensor of the model, under the same name. A function of `meta` alone."""

    def encode(
        self,
        manifest: Manifest,
        rows: Sequence[int],
        sources: Sequence[torch.Tensor],
        arena: Sequence[torch.Tensor],
    ) -> np.ndarray | None:
        """The trainer's end: write what travels for `sources`, tensors `rows` of the model's `manifest`, into `arena`.

        Sources may have another dtype than the model's, any strides and any device. Returns the fingerprints of the
        tensors (N,) uint64, in the model's dtypes; None: they are those of what travels. Values that are not finite
        are looked for in what travels; whoever hides them there looks here.
        """


class Full:
    """Tensors as they are, in the model's dtypes."""

    name = "full"
    verbatim = True

    def carried(self, meta: TensorMeta) -> TensorMeta:
        return meta

    def encode(
        self,
        manifest: Manifest,
        rows: Sequence[int],
        sources: Sequence[torch.Tensor],
        arena: Sequence[torch.Tensor],
    ) -> None:
        copy_tensors(list(arena), list(sources))


FULL = Full()
"""The one that everybody uses today."""
