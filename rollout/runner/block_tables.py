"""Block tables of running requests as rows of one array, kept up as blocks are added."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..scheduling.request import Request


@dataclass(slots=True)
class _Row:
    index: int
    block_ids: list[int]
    filled: int


class HostBlockTables:
    """One row per request that was seen lately; (rows, width) int32."""

    def __init__(self, max_rows: int, width: int) -> None:
        self._tables = np.zeros((2 * max_rows, width), dtype=np.int32)
        self._rows: dict[Request, _Row] = {}
        self._free = list(range(2 * max_rows))
        self.num_resets = 0
        """Grows whenever a request's blocks are others than before, rather than more."""

    def rows(self, requests: Sequence[Request]) -> npt.NDArray[np.int64]:
        """(N): each request's row, brought up to date; at most `max_rows` requests."""
        if len(self._free) < len(requests):
            self._forget_all_but(requests)
        rows, free, tables = self._rows, self._free, self._tables
        indices = []
        for request in requests:
            block_ids = request.block_ids
            row = rows.get(request)
            if row is None:
                row = rows[request] = _Row(free.pop(), [], 0)
            # A sequence that lost its blocks has another list.
            if row.block_ids is not block_ids:
                row.block_ids, row.filled = block_ids, 0
                self.num_resets += 1
            if row.filled != len(block_ids):
                tables[row.index, row.filled : len(block_ids)] = block_ids[row.filled :]
                row.filled = len(block_ids)
            indices.append(row.index)
        return np.array(indices)

    def gather(self, rows: npt.NDArray[np.int64], width: int) -> npt.NDArray[np.int32]:
        """(N, width): the first blocks of these rows; what lies past a sequence's last block is anything."""
        return self._tables[rows, :width]

    def _forget_all_but(self, requests: Sequence[Request]) -> None:
        kept = set(requests)
        for request in [request for request in self._rows if request not in kept]:
            self._free.append(self._rows.pop(request).index)
