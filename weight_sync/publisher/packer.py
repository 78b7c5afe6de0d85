"""Packing on a GPU: all tensors of an update into the arena, and fingerprints of what was packed, in a few launches.

One pass over the bytes, casts, strides and the look for NaN and infinities included, whatever the number of tensors.
What is worked out from their layouts serves as long as the layouts stay; addresses may change from update to update.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from rollout_kernels.copy_table import CopyTable

from ..layout.device_sums import PieceList, addresses_of
from ..layout.fingerprints import ArenaFingerprints
from ..layout.manifest import Manifest

_Layouts = tuple[bytes, list[torch.dtype], list[int], list[tuple[int, ...] | None], list[bool]]


class DevicePacker:
    """Packs into one arena of a GPU."""

    def __init__(
        self, manifest: Manifest, buffer: torch.Tensor, fingerprints: ArenaFingerprints
    ) -> None:
        """`buffer` (uint8) has the manifest's layout; `fingerprints` reads what torch packed."""
        self._manifest = manifest
        self._buffer = buffer
        self._fingerprints = fingerprints
        self._layouts: _Layouts | None = None
        self._same: object = None  # What `layouts` was when these were looked at.
        self._table: CopyTable | None = None
        self._addresses: np.ndarray | None = None
        self._fast = np.empty(0, dtype=np.int64)
        self._slow: list[int] = []

    @torch.no_grad()
    def pack(
        self,
        rows: np.ndarray,
        sources: Sequence[torch.Tensor],
        *,
        check_finite: bool = True,
        addresses: np.ndarray | None = None,
        layouts: object = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Copy `sources`, any of this process, to `rows` (int64) of the manifest. addresses, layouts: see `Selection`.

        Returns fingerprints, (N,) uint64, in the order of `rows`, and which of these (ascending, int64) may hold NaN
        or infinities: all others certainly do not. Without `check_finite` there are none. Issued on the calling
        thread's current stream; returns when all is packed.
        """
        if addresses is None:
            addresses = addresses_of(sources)
        if layouts is None or layouts is not self._same or not self._suits(addresses):
            self._prepare(rows, sources, addresses)
            self._same = layouts
        table = self._table
        assert table is not None
        run = table.run_checked if check_finite else table.run
        packed = run(self._read(addresses), [self._buffer.data_ptr()])
        for i in self._slow:
            self._manifest.view(self._buffer, int(rows[i])).copy_(sources[i])
        found = packed.cpu().numpy().reshape(1 + check_finite, -1)
        values, suspects = found[0], self._fast[np.flatnonzero(found[1:].sum(0))]
        if self._slow:
            values = np.empty(len(rows), dtype=np.int64)
            values[self._fast] = found[0]
            values[self._slow] = self._fingerprints.values(self._buffer, rows[self._slow]).numpy()
            if check_finite:
                suspects = np.append(suspects, self._slow)
        return values.view(np.uint64), np.sort(rows[suspects])

    def _suits(self, addresses: np.ndarray) -> bool:
        """Whether the table takes tensors of its layouts at these addresses."""
        if self._addresses is None or not np.array_equal(addresses, self._addresses):
            assert self._table is not None
            if not self._table.fits(self._read(addresses), [self._buffer.data_ptr()]):
                return False
            self._addresses = addresses
        return True

    def _read(self, addresses: np.ndarray) -> torch.Tensor:
        """Those that the table reads."""
        return _read(addresses, self._fast if self._slow else None)

    def _prepare(
        self, rows: np.ndarray, sources: Sequence[torch.Tensor], addresses: np.ndarray
    ) -> None:
        """Have the table for tensors of these layouts, after a look at all of them."""
        layouts: _Layouts = (
            rows.tobytes(),
            [tensor.dtype for tensor in sources],
            [tensor.get_device() for tensor in sources],
            [None if tensor.is_contiguous() else tensor.stride() for tensor in sources],
            [tensor.is_neg() for tensor in sources],
        )
        if self._table is not None and layouts == self._layouts and self._suits(addresses):
            return
        listed = PieceList()
        fast: list[int] = []
        slow: list[int] = []
        here, metas, offsets = (
            self._buffer.get_device(),
            self._manifest.tensors,
            self._manifest.offsets,
        )
        for i, (row, tensor) in enumerate(zip(rows.tolist(), sources, strict=True)):
            added = tensor.get_device() == here and listed.add(
                tensor, metas[row].dtype, offsets[row]
            )
            (fast if added else slow).append(i)
        read = _read(addresses, fast if slow else None)
        targets = [self._buffer.data_ptr()]
        table = listed.table(read, targets, self._buffer.device, copy=True)
        self._table, self._fast, self._slow = table, np.array(fast, dtype=np.int64), slow
        self._layouts, self._addresses = layouts, addresses


def _read(addresses: np.ndarray, numbers: Sequence[int] | np.ndarray | None) -> torch.Tensor:
    """Those of `numbers`, None: all, as a table takes them."""
    return torch.from_numpy((addresses if numbers is None else addresses[numbers]).view(np.int64))
