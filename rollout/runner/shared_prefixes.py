"""Which requests of a decode step begin with the same blocks, so that those are read once for all of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rollout_kernels.shared_prefix_decode import members_per_tile
from rollout_kernels.shared_prefixes import find_shared_prefixes, num_numbers, packed

from ..scheduling.request import Request
from .attention_backend import BackendContext

_LEAST_SHARE = 8
"""Sharing pays when it saves one in so many of the keys that a step reads."""


@dataclass(frozen=True, slots=True)
class FoundPrefixes:
    """What a step's rows share."""

    num_rows: int
    """N, padding included."""
    numbers: npt.NDArray[np.int32]
    """As the kernels take them."""
    pays: bool
    """Reading it once is faster."""

    @property
    def done(self) -> npt.NDArray[np.int32]:
        """(N): keys of each row that are read with those of others."""
        num = self.num_rows
        return self.numbers[num : 2 * num] if self.pays else np.zeros(num, np.int32)


class PrefixFinder:
    """Looks again only when the batch, or somebody's blocks, are others than in the step before."""

    def __init__(self, context: BackendContext, wanted: bool) -> None:
        """wanted: the backend reads shared prefixes once."""
        layer = context.model.attention_layer
        self._block_size = context.block_size
        self.possible = wanted and None in context.config.sliding_windows
        """Some layer has no window, and the backend can."""
        self._members = members_per_tile(
            context.device,
            head_dim=layer.head_dim,
            group=layer.num_heads // layer.num_kv_heads,
            dtype=context.dtype,
            deterministic=context.deterministic,
        )
        self._requests: list[Request] = []
        self._resets = -1
        self._found: tuple[int, npt.NDArray[np.int32], int] = (0, np.zeros(0, np.int32), 0)

    def find(
        self,
        requests: list[Request],
        positions: npt.NDArray[np.int32],
        size: int,
        num_resets: int,
    ) -> FoundPrefixes:
        """For a graph of `size` rows; `num_resets` of the block tables tells whether blocks are others."""
        known_size, numbers, saved = self._found
        if known_size != size or num_resets != self._resets or requests != self._requests:
            numbers, saved = self._look(requests, positions, size)
            self._found = size, numbers, saved
            self._requests, self._resets = list(requests), num_resets
        pays = saved > 0 and saved * _LEAST_SHARE >= int(positions.sum())
        return FoundPrefixes(size, numbers, pays)

    def _look(
        self, requests: list[Request], positions: npt.NDArray[np.int32], size: int
    ) -> tuple[npt.NDArray[np.int32], int]:
        """The numbers, and how many keys need not be read."""
        nothing = np.zeros(num_numbers(size), np.int32)
        if not self.possible or len(requests) < 2:
            return nothing, 0
        full = (positions // self._block_size).tolist()
        tables = [r.block_ids[:n] for r, n in zip(requests, full, strict=True)]
        groups = find_shared_prefixes(tables, block_size=self._block_size)
        if not groups:
            return nothing, 0
        numbers = packed(
            groups,
            max_batch=size,
            block_size=self._block_size,
            members_per_tile=self._members,
        )
        saved = sum((len(group.rows) - 1) * group.num_blocks for group in groups)
        return np.array(numbers, np.int32), saved * self._block_size
