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

from ..layout.manifest import Manifest, TensorMeta
from .copies import Copy, Indices, Occupied, Replay
from .parallel_copy import copy_tensors


class Decoder(Protocol):
    """Compiled once for a manifest, or a chunk of one, and the rows of its plan."""

    def run(self, stage: torch.Tensor, present: Indices | None) -> None:
        """Write what has travelled, in `stage` (uint8), to the rows' destinations; only the tensors `present`, unless
        it is None. Returns when every copy was issued."""


class Encoding(Protocol):
    """Stateless, or with the state of one trainer or one rank alone."""

    name: str
    """What `Begin.encoding` says."""
    verbatim: bool
    """What travels is what is written: it may arrive in the memory from which it is written."""

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

    def decoder(self, manifest: Manifest, copies: Sequence[Copy], occupied: Occupied) -> Decoder:
        """The engine's end: what writes rows of a plan. `manifest`: what travels; `Copy.resident`: what serves now.

        The part of a tensor that a rank holds is all that it may look at: what it decodes depends on no other part.
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

    def decoder(self, manifest: Manifest, copies: Sequence[Copy], occupied: Occupied) -> Replay:
        return Replay(manifest, copies, occupied)


FULL = Full()
"""The one that everybody uses today."""
