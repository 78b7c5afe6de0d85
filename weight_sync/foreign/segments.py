"""Files of shared memory that torch made for its sharing strategy `file_system`.

A file begins with a count of its users, alone in 64 bytes; the storage follows. Its sender counted one reference up for
the reader; whoever counts down to zero removes the file. Bytes are read, not mapped: a file that shrinks meanwhile is
an error then, and not the end of this process.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import stat
import struct
from types import TracebackType
from typing import Self

import torch

from ..errors import TransportError
from .records import Segment

_FOLDER = "/dev/shm"
_HEADER_BYTES = 64
_COUNT = struct.Struct("<i")
_COUNTER = struct.Struct("<q")
_READ_BYTES = 1 << 30


class SegmentFile:
    """One file, open; `TransportError` where it is not what torch makes, or not of this user."""

    def __init__(self, name: str, num_bytes: int) -> None:
        """`name`: as of `shm_open`, checked before; `num_bytes`: what it must have behind the header."""
        self.name = name
        self._path = _FOLDER + name
        try:
            flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
            self._fd = os.open(self._path, flags)
        except OSError as error:
            raise self._refusal(
                f"it cannot be opened ({error}): the trainer has gone, its payload was read already, or it runs on "
                "another machine or as another user"
            ) from error
        try:
            self._check(num_bytes)
        except BaseException:
            os.close(self._fd)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._fd)

    def _check(self, num_bytes: int) -> None:
        found = os.fstat(self._fd)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
            raise self._refusal("it is no plain file of this user")
        if found.st_size < _HEADER_BYTES + num_bytes:
            raise self._refusal(
                f"it has {found.st_size} bytes, expected at least {_HEADER_BYTES + num_bytes}"
            )
        if _COUNT.unpack(os.pread(self._fd, _COUNT.size, 0))[0] < 1:
            raise self._refusal("nobody uses it any more")

    def read(self, start: int, end: int) -> torch.Tensor:
        """A copy of the storage's bytes from `start` to before `end`: uint8, 1-d."""
        copy = torch.empty(end - start, dtype=torch.uint8)
        view = copy.numpy().data
        done = 0
        while done < len(view):
            part = view[done : done + _READ_BYTES]
            count = os.preadv(self._fd, [part], _HEADER_BYTES + start + done)
            if count == 0:
                raise self._refusal("it became shorter while it was read")
            done += count
        return copy

    def give_back(self, references: int) -> None:
        """Count down what the sender counted up; the last user's file is removed."""
        with mmap.mmap(self._fd, _HEADER_BYTES) as header:
            count = ctypes.c_uint64.from_buffer(header)
            try:
                for _ in range(references):
                    # Python has no atomic operation on shared memory; a semaphore's is one, on the same integer.
                    ctypes.CDLL(None).sem_trywait(ctypes.byref(count))
            finally:
                del count
        if _COUNT.unpack(os.pread(self._fd, _COUNT.size, 0))[0] == 0:
            try:
                os.unlink(self._path)
            except FileNotFoundError:
                pass  # another user counted down at the same time

    def count_down(self, index: int) -> None:
        """Take one off a counter in the file, as torch does with those of GPU memory: its owner looks for zero."""
        place = _HEADER_BYTES + index * _COUNTER.size
        (count,) = _COUNTER.unpack(os.pread(self._fd, _COUNTER.size, place))
        os.pwrite(self._fd, _COUNTER.pack(max(0, count - 1)), place)

    def _refusal(self, why: str) -> TransportError:
        return TransportError(
            f"cannot read the shared memory {self.name} of a serialized tensor: {why}; expected the file that torch "
            "made for it; serialize and send the tensors again, once"
        )


def read_segment(segment: Segment, start: int, end: int) -> torch.Tensor:
    """A copy of the bytes of `segment` from `start` to before `end`: uint8, 1-d, on the CPU."""
    if not segment.name:
        return torch.empty(0, dtype=torch.uint8)
    with SegmentFile(segment.name, segment.num_bytes) as file:
        return file.read(start, end)
