"""Copies into a GPU whose fingerprints are of what has been written, read back behind the write in the same pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch

from rollout_kernels.copy_pieces import Piece
from rollout_kernels.copy_table import CopyTable, reads_back

from ..layout import region as regions
from ..layout.manifest import Manifest
from .copies import Copy, DeviceCopies, StorageTable


class ReadBackCopies:
    """The copies of some tensors out of a stage on their GPU; most of them tell what is there afterwards."""

    def __init__(self, manifest: Manifest, stage: torch.Tensor, copies: Sequence[Copy]) -> None:
        self._memory = StorageTable()
        pieces: list[Piece] = []
        rows: list[int] = []
        rest: list[Copy] = []
        parts = Counter(copy.index for copy in copies)
        for copy in copies:
            piece = self._piece(manifest, copy, len(rows)) if parts[copy.index] == 1 else None
            if piece is None or not reads_back(piece, [stage.data_ptr()], self._memory.addresses()):
                rest.append(copy)
            else:
                pieces.append(piece)
                rows.append(copy.index)
        self.rows = np.array(rows, dtype=np.int64)
        """The tensors whose fingerprints `run` has, ascending."""
        filled = [i for i, meta in enumerate(manifest.tensors) if meta.num_bytes]
        self.others = np.setdiff1d(filled, self.rows)
        """The others that are not empty, ascending."""
        self._rest = DeviceCopies(manifest, stage, (), (), rest) if rest else None
        self._table = CopyTable(
            pieces,
            sources=[stage.data_ptr()],
            targets=self._memory.addresses(),
            device=stage.device,
            num_outputs=len(rows),
            read_back=True,
        )

    def fits(self, stage: torch.Tensor) -> bool:
        """Whether it can serve for this stage."""
        here = self._table.fits([stage.data_ptr()], self._memory.addresses())
        rest = self._rest is None or self._rest.fits(stage)
        return self._table.device == stage.device and here and rest

    def run(self, stage: torch.Tensor) -> torch.Tensor:
        """Issue the copies on the current stream; the fingerprints of `rows`, (N,) int64 on the device."""
        if self._rest is not None:
            self._rest.run(stage)
        return self._table.run([stage.data_ptr()], self._memory.addresses())

    def _piece(self, manifest: Manifest, copy: Copy, output: int) -> Piece | None:
        """Bytes that are one run at both ends, and a whole tensor; or None."""
        meta, to = manifest.tensors[copy.index], copy.destination
        whole = copy.region == regions.whole(meta.shape)
        if not whole or not to.is_contiguous() or to.dtype != meta.dtype:
            return None
        return Piece(
            source=0,
            source_offset=manifest.offsets[copy.index],
            target=self._memory.number(to),
            target_offset=int(to.storage_offset()) * to.element_size(),
            sizes=(to.nbytes,),
            source_strides=(1,),
            target_strides=(1,),
            source_dtype=torch.uint8,
            target_dtype=torch.uint8,
            output=output,
            place_strides=(1,),
        )
