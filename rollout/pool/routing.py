"""Which replica gets a prompt: the least busy one, unless the one that may know its beginning is hardly busier."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

MAX_IMBALANCE = 1.25
"""How many times busier than the least busy replica the preferred one may be, apart from the slack."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Router:
    """Chooses; a function of what it is told, without state of its own."""

    limit: int
    """Samples that a replica may have at once."""
    affinity_tokens: int
    """Leading tokens that decide which replica a prompt prefers; shorter prompts, and 0, prefer none."""
    slack: int
    """Samples by which the preferred replica may be busier."""

    def affinity(self, token_ids: Sequence[int]) -> bytes | None:
        """What prompts with the same beginning have in common; None where there is too little of it to share."""
        if not 0 < self.affinity_tokens <= len(token_ids):
            return None
        head = array("q", token_ids[: self.affinity_tokens]).tobytes()
        return hashlib.blake2b(head, digest_size=8).digest()

    def choose(
        self, affinity: bytes | None, num_samples: int, loads: Mapping[int, int]
    ) -> int | None:
        """The replica (a key of `loads`, which counts samples) for a prompt; None: all are full, it has to wait.

        An idle replica takes a prompt of any size, so that none waits for ever.
        """
        open_ = {
            number: load
            for number, load in loads.items()
            if load == 0 or load + num_samples <= self.limit
        }
        if not open_:
            return None
        least = min(open_, key=lambda number: (open_[number], number))
        if affinity is None:
            return least
        preferred = max(loads, key=lambda number: _weight(affinity, number))
        bound = MAX_IMBALANCE * open_[least] + self.slack
        return preferred if open_.get(preferred, bound + 1) <= bound else least


def _weight(affinity: bytes, number: int) -> bytes:
    """Highest wins. When a replica comes or goes, only prompts that preferred it change their mind."""
    return hashlib.blake2b(affinity + number.to_bytes(8, "little"), digest_size=8).digest()
