"""The engine's end of an encoding: how what has travelled becomes the parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch

from ..layout.encoding import Encoding
from ..layout.manifest import Manifest
from .copies import Copy, Indices, Occupied, Replay


class Decoder(Protocol):
    """Compiled once for a manifest, or a chunk of one, and the rows of its plan."""

    def run(self, stage: torch.Tensor, present: Indices | None) -> None:
        """Write what has travelled, in `stage` (uint8), to the rows' destinations; only the tensors `present`, unless
        it is None. Returns when every copy was issued."""


@runtime_checkable
class Decoding(Encoding, Protocol):
    """An encoding whose bytes are not what is written."""

    def decoder(self, manifest: Manifest, copies: Sequence[Copy], occupied: Occupied) -> Decoder:
        """What writes rows of a plan. `manifest`: what travels; `Copy.resident`: what serves now.

        The part of a tensor that a rank holds is all that it may look at: what it decodes depends on no other part.
        """


def decoder_of(
    encoding: Encoding, manifest: Manifest, copies: Sequence[Copy], occupied: Occupied
) -> Decoder:
    """What writes rows of a plan whose tensors travel as `encoding`."""
    if encoding.verbatim:
        return Replay(manifest, copies, occupied)
    assert isinstance(encoding, Decoding), f"{encoding.name} has no engine's end"
    return encoding.decoder(manifest, copies, occupied)
