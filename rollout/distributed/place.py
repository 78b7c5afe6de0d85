"""Where a rank stands among others, under the names that the field has for it."""

from __future__ import annotations


class Place:
    """One rank of a group whose ranks are numbered from 0."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        """This rank's position, from 0."""
        self.size = size
        """Number of ranks."""

    @property
    def world_size(self) -> int:
        """`size`, under the name that it has elsewhere."""
        return self.size

    @property
    def rank_in_group(self) -> int:
        """`rank`, likewise."""
        return self.rank

    @property
    def ranks(self) -> list[int]:
        """All positions."""
        return list(range(self.size))

    @property
    def first_rank(self) -> int:
        """The first position."""
        return 0

    @property
    def last_rank(self) -> int:
        """The last position."""
        return self.size - 1

    @property
    def is_first_rank(self) -> bool:
        """Whether this is the first one."""
        return self.rank == self.first_rank

    @property
    def is_last_rank(self) -> bool:
        """Whether this is the last one."""
        return self.rank == self.last_rank

    @property
    def next_rank(self) -> int:
        """The position behind this one; the first, behind the last."""
        return (self.rank + 1) % self.size

    @property
    def prev_rank(self) -> int:
        """The position before this one; the last, before the first."""
        return (self.rank - 1) % self.size
