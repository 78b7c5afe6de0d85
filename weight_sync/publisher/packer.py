"""Packing on a GPU: all tensors of an update into the arena, and fingerprints of what was packed, in a few launches.

One pass over the bytes, casts, strides and the look for NaN and infinities included, whatever the number of tensors.
What is worked out from their layouts serves as long as the layouts stay; addresses may change from update to update.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rollout_kernels.copy_table import CopyTable

from ..layout.device_sums import PieceList, addresses_of
from ..layout.fingerprints import ArenaFingerprints
from ..layout.manifest import Manifest

_Layouts = tuple[bytes, list[torch.dtype], list[int], list[tuple[int, ...] | None], list[bool]]
_LEAST_PART, _MOST_PARTS = 4096, 4
"""Tensors in a part of its own, which is packed as soon as its tensors are known; launches take longer than fewer."""


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
        self._parts: list[_Part] = []
        self._ahead: list[torch.Tensor] = []
        self._ahead_of: tuple[np.ndarray | None, bool] = None, False
        self.begun_at: float | None = None
        """When (`time.perf_counter`) the packing began that `pack` is to end; None: it did not."""

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
        packed = self._taken_ahead(addresses, check_finite)
        if addresses is None:
            addresses = addresses_of(sources)
        if layouts is None or layouts is not self._same or not self._suits(addresses):
            packed = []
            self._prepare(rows, sources, addresses)
            self._same = layouts
        for part in self._parts[len(packed) :]:
            packed.append(self._launch(part, sources, addresses, check_finite))
        found = torch.cat(packed, dim=1).cpu().numpy() if packed else np.empty((2, 0), np.int64)
        fast = np.concatenate([part.fast for part in self._parts] or [np.empty(0, np.int64)])
        slow = [i for part in self._parts for i in part.slow]
        values, suspects = found[0], fast[np.flatnonzero(found[1:].sum(0))]
        if slow:
            values = np.empty(len(rows), dtype=np.int64)
            values[fast] = found[0]
            values[slow] = self._fingerprints.values(self._buffer, rows[slow]).numpy()
            if check_finite:
                suspects = np.append(suspects, slow)
        return values.view(np.uint64), np.sort(rows[suspects])

    def pack_ahead(
        self,
        sources: Sequence[torch.Tensor],
        addresses: np.ndarray,
        num_known: int,
        layouts: object,
        *,
        check_finite: bool,
    ) -> None:
        """Begin with the first `num_known` tensors of a `pack` that is to come, with the very object `addresses`, where
        they are laid out as before. `pack` alone says that anything is packed; `wait` if it does not come."""
        if layouts is None or layouts is not self._same:
            return
        if self._ahead_of[0] is not addresses or self._ahead_of[1] is not check_finite:
            self._ahead, self._ahead_of = [], (addresses, check_finite)
        for part in self._parts[len(self._ahead) :]:
            if part.last > num_known or not part.suits(addresses, self._buffer):
                return
            if not self._ahead:
                self.begun_at = time.perf_counter()
            self._ahead.append(self._launch(part, sources, addresses, check_finite))

    def wait(self) -> None:
        """Until nothing reads the tensors any more that were begun with."""
        if self._taken_ahead(self._ahead_of[0], self._ahead_of[1]) and self._buffer.is_cuda:
            torch.cuda.current_stream(self._buffer.device).synchronize()

    def _taken_ahead(self, addresses: np.ndarray | None, check_finite: bool) -> list[torch.Tensor]:
        """What was begun of these, which is known no longer."""
        ahead, of = self._ahead, self._ahead_of
        self._ahead, self._ahead_of, self.begun_at = [], (None, False), None
        same = of[0] is not None and of[0] is addresses and of[1] is check_finite
        return ahead if same else []

    @torch.no_grad()
    def _launch(
        self,
        part: _Part,
        sources: Sequence[torch.Tensor],
        addresses: np.ndarray,
        check_finite: bool,
    ) -> torch.Tensor:
        """Fingerprints and suspects of a part, (2, M), or without the second row; on the GPU."""
        run = part.table.run_checked if check_finite else part.table.run
        packed = run(part.read(addresses), [self._buffer.data_ptr()])
        for i, row in zip(part.slow, part.slow_rows, strict=True):
            self._manifest.view(self._buffer, row).copy_(sources[i])
        return packed.reshape(1 + check_finite, -1)

    def _suits(self, addresses: np.ndarray) -> bool:
        """Whether the tables take tensors of their layouts at these addresses."""
        return all(part.suits(addresses, self._buffer) for part in self._parts)

    def _prepare(
        self, rows: np.ndarray, sources: Sequence[torch.Tensor], addresses: np.ndarray
    ) -> None:
        """Have tables for tensors of these layouts, after a look at all of them."""
        layouts: _Layouts = (
            rows.tobytes(),
            [tensor.dtype for tensor in sources],
            [tensor.get_device() for tensor in sources],
            [None if tensor.is_contiguous() else tensor.stride() for tensor in sources],
            [tensor.is_neg() for tensor in sources],
        )
        if layouts == self._layouts and self._suits(addresses):
            return
        length = max(_LEAST_PART, -(-len(rows) // _MOST_PARTS))
        self._parts = [
            self._part(rows, sources, addresses, first, min(first + length, len(rows)))
            for first in range(0, len(rows), length)
        ]
        self._layouts = layouts

    def _part(
        self,
        rows: np.ndarray,
        sources: Sequence[torch.Tensor],
        addresses: np.ndarray,
        first: int,
        last: int,
    ) -> _Part:
        listed = PieceList()
        fast: list[int] = []
        slow: list[int] = []
        here = self._buffer.get_device()
        metas, offsets = self._manifest.tensors, self._manifest.offsets
        for i, row in enumerate(rows[first:last].tolist(), first):
            tensor = sources[i]
            added = tensor.get_device() == here and listed.add(
                tensor, metas[row].dtype, offsets[row]
            )
            (fast if added else slow).append(i)
        numbers = np.array(fast, dtype=np.int64)
        table = listed.table(
            _column(addresses[numbers]), [self._buffer.data_ptr()], self._buffer.device, copy=True
        )
        slow_rows = rows[slow].tolist()
        return _Part(table, addresses[first:last], first, last, numbers, slow, slow_rows)


@dataclass(slots=True)
class _Part:
    """Some of the tensors that are packed, one behind the other as they are given."""

    table: CopyTable
    addresses: np.ndarray
    """Of all of them, when they came last."""
    first: int
    last: int
    fast: np.ndarray
    """Which the table packs, as positions among all that are packed, int64."""
    slow: list[int]
    """Which torch packs."""
    slow_rows: list[int]
    """Their rows of the manifest."""

    def suits(self, addresses: np.ndarray, buffer: torch.Tensor) -> bool:
        """Whether the table takes tensors of its layouts at these addresses, of all that are packed."""
        here = addresses[self.first : self.last]
        if not np.array_equal(here, self.addresses):
            if not self.table.fits(self.read(addresses), [buffer.data_ptr()]):
                return False
            self.addresses = here
        return True

    def read(self, addresses: np.ndarray) -> torch.Tensor:
        """Those that the table reads."""
        return _column(addresses[self.fast] if self.slow else addresses[self.first : self.last])


def _column(addresses: np.ndarray) -> torch.Tensor:
    """As a table takes them."""
    return torch.from_numpy(addresses.view(np.int64))
