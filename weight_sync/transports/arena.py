"""The memory through which weights travel: written by a trainer, read by an engine, reused by every update.

A trainer's `Arena` has a buffer and a handle; the engine opens the handle once and keeps what it opened
(`staging.opened_arena`). Which of the two may touch the bytes is the protocol's business: the trainer until it has said
`Bucket`, then the engine until the session has ended.
"""

import contextlib
import mmap
import warnings
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Protocol

import torch

from ..layout.memory import Range
from ..wire.messages import ArenaHandle

_MADV_POPULATE_READ = 22
_MADV_POPULATE_WRITE = 23
_POPULATE_BYTES = 8 << 20


class Arena(Protocol):
    """The trainer's end."""

    @property
    def buffer(self) -> torch.Tensor:
        """The bytes, uint8; valid until `close`."""

    @property
    def handle(self) -> ArenaHandle:
        """What the engine needs to find them."""

    @property
    def broken(self) -> str | None:
        """Why it cannot carry anything any more, or None."""

    def send(self, ranges: Sequence[Range], timeout_s: float) -> "Future[None] | None":
        """Carry these ranges to the engine, which has been told to expect them; None where it sees them anyway."""

    def close(self) -> None:
        """Give the memory back, here; the engine's mapping lives until it closes too. Safe to repeat."""


class SharedBytes:
    """Part of both ends where trainer and engine look at the same memory: nothing has to be carried."""

    broken: str | None = None
    unstaged: bool = False

    def send(self, ranges: Sequence[Range], timeout_s: float) -> "Future[None] | None":
        """The engine sees the bytes."""
        return None

    def refuse(self) -> None:
        """Nothing is under way."""

    def given_up(self) -> bool:
        """Not to be seen from here."""
        return False


class Mapping:
    """A memory map as a uint8 tensor, in large pages where the system has them.

    The map cannot be taken away while a tensor still uses it: `close` drops what it can, and the last view that goes
    gives back the rest.
    """

    def __init__(self, fileno: int, num_bytes: int, *, offset: int = 0, writable: bool) -> None:
        access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
        if fileno == -1:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            self._map: mmap.mmap | None = mmap.mmap(-1, num_bytes + offset, flags=flags)
        else:
            self._map = mmap.mmap(fileno, num_bytes + offset, access=access)
        _prepare(self._map, writable)
        self._tensor: torch.Tensor | None = _as_tensor(self._map, num_bytes, offset)

    @property
    def tensor(self) -> torch.Tensor:
        """The bytes behind `offset`."""
        assert self._tensor is not None, "the mapping was closed"
        return self._tensor

    def header(self, num_bytes: int) -> bytes:
        """The first bytes of the map."""
        assert self._map is not None, "the mapping was closed"
        return self._map[:num_bytes]

    def write_header(self, header: bytes) -> None:
        """Set the first bytes of the map."""
        assert self._map is not None, "the mapping was closed"
        self._map[: len(header)] = header

    def close(self) -> None:
        """Unmap now, or with the last tensor that still views it."""
        # Not `mmap.close()`: torch keeps the object alive but does not export its buffer, so closing it would unmap
        # memory under living tensors.
        self._tensor = None
        self._map = None


def _prepare(memory: mmap.mmap, writable: bool) -> None:
    """Hints: without them the first update pays a page fault per 4 KiB, in the middle of its copies.

    Piece by piece, because `madvise` keeps the interpreter lock: gigabytes at once would stop every thread of this
    process for seconds, an engine's loop and heartbeats among them.
    """
    populate = _MADV_POPULATE_WRITE if writable else _MADV_POPULATE_READ
    with contextlib.suppress(OSError, ValueError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    with contextlib.suppress(OSError, ValueError):
        for start in range(0, len(memory), _POPULATE_BYTES):
            memory.madvise(populate, start, min(_POPULATE_BYTES, len(memory) - start))


def _as_tensor(memory: mmap.mmap, num_bytes: int, offset: int) -> torch.Tensor:
    if num_bytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    with warnings.catch_warnings():
        # A map for reading is not writable, and that is the point.
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(memory, dtype=torch.uint8, count=num_bytes, offset=offset)
