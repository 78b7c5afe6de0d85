"""Memory for messages whose sender may have announced the wrong length.

gloo ends the whole process when a message is longer than the memory that was posted for it, and says nothing when one
is shorter. A member that keeps what it receives to itself can post more than it expects: everything up to the end of an
allocation with room to spare. Two marks, at the last expected bytes and right behind them, tell whether as many came.
"""

from __future__ import annotations

import mmap
import os

import torch

from ..errors import TransportError

_MARK_BYTES = 16
_MIN_INNER_MARK_BYTES = 8  # a shorter mark could meet its own value in the data
_MAP_NORESERVE = 0x4000
_MADV_POPULATE_WRITE = 23
_SPARE_BYTES = 64 << 20


def landing_buffer(num_bytes: int) -> torch.Tensor:
    """`num_bytes` of uint8 on the CPU whose allocation goes on behind them, in address space that costs no memory.

    The room is four times the size: a tensor that was announced as bfloat16 and sent as float64 still fits.
    """
    room = max(num_bytes, 1) * 5 + _SPARE_BYTES
    try:
        memory = mmap.mmap(-1, room, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
    except (OSError, ValueError):
        return torch.empty(num_bytes, dtype=torch.uint8)  # address space is limited: no room
    if num_bytes:
        for advice, length in ((mmap.MADV_HUGEPAGE, room), (_MADV_POPULATE_WRITE, num_bytes)):
            try:
                memory.madvise(advice, 0, length)
            except (OSError, ValueError):
                pass  # hints
    return torch.frombuffer(memory, dtype=torch.uint8)[:num_bytes]


def forwards(rank: int, size: int) -> bool:
    """Whether gloo's broadcast from rank 0 makes `rank` pass on what it gets; it then passes on all that it posted."""
    return rank > 0 and rank + (1 << rank.bit_length()) < size


class Landing:
    """One expected message: `posted` is what to receive into, `check` says whether exactly `part` was filled.

    What follows `part` in its allocation is scratch until `check`, which puts the bytes right behind it back. A message
    that was too long has overwritten more than those: throw the whole update away.
    """

    def __init__(self, part: torch.Tensor) -> None:
        self._part = part
        storage = part.untyped_storage()
        start = part.storage_offset()
        whole = torch.empty(0, dtype=torch.uint8).set_(storage, start, (storage.nbytes() - start,))  # type: ignore[call-overload]
        self.posted: torch.Tensor = whole
        self._behind = whole[part.numel() : part.numel() + _MARK_BYTES]
        self._inside = part[-_MARK_BYTES:] if part.numel() >= _MIN_INNER_MARK_BYTES else part[:0]
        self._kept = self._behind.clone()
        marks = torch.frombuffer(bytearray(os.urandom(2 * _MARK_BYTES)), dtype=torch.uint8)
        self._inner_mark = marks[: self._inside.numel()].clone()
        self._outer_mark = marks[_MARK_BYTES : _MARK_BYTES + self._behind.numel()].clone()
        self._inside.copy_(self._inner_mark)
        self._behind.copy_(self._outer_mark)

    def check(self, what: str) -> None:
        """`TransportError` unless as many bytes came as `part` has."""
        longer = not torch.equal(self._behind, self._outer_mark)
        shorter = self._inside.numel() > 0 and torch.equal(self._inside, self._inner_mark)
        self._behind.copy_(self._kept)
        if longer or shorter:
            raise TransportError(
                f"{what}: got {'more' if longer else 'fewer'} bytes than announced, expected {self._part.numel()}; "
                "send each tensor in the dtype and shape that were announced for it"
            )


def can_guard(part: torch.Tensor) -> bool:
    """Whether `Landing` works for `part`: on the CPU, not empty, with room behind it in its allocation."""
    if part.device.type != "cpu" or part.numel() == 0:
        return False
    room = part.untyped_storage().nbytes() - part.storage_offset() - part.numel()
    return room >= _MARK_BYTES
