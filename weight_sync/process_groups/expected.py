"""Memory for messages whose sender may have announced the wrong length: every member proves that of what it took.

gloo ends the whole process when a message is longer than the memory that was posted for it, and says nothing when one
is shorter. So a member posts more than it expects, and puts marks over the last expected bytes and right behind them:
a mark that is still there was not reached, one that is gone was written over.

The marks are the same in every member. gloo broadcasts along a tree, whose inner members pass on all that they posted,
marks and all: whoever gets bytes through others sees the same marks as they do, and all come to the same answer.
"""

from __future__ import annotations

import mmap

import torch

from ..errors import TransportError

_TAIL = bytes(range(0x51, 0x5F)) + b"\xfb\xff"
"""Over the last expected bytes. Its end is no number in any floating-point format: two bytes of it tell enough."""
_BEHIND = bytes(range(0xA1, 0xB1))
"""Right behind them."""
_FORWARDED_SPARE_BYTES = 8 << 20
_MAP_NORESERVE = 0x4000
_MADV_POPULATE_WRITE = 23
_SPARE_BYTES = 64 << 20


def receive_buffer(num_bytes: int) -> torch.Tensor:
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


def post(part: torch.Tensor, *, rank: int, size: int, telling: int) -> ExpectedMessage:
    """Mark `part` for a broadcast from rank 0 to member `rank` of `size`. Raises `TransportError` where it must not be.

    What is forwarded travels, so whoever forwards posts less than there is: room for elements of twice the width, or
    for 8 MiB. Whoever is behind another must have room for as much.
    """
    forwarded = max(part.numel(), _FORWARDED_SPARE_BYTES)
    message = ExpectedMessage(
        part, spare=forwarded if forwards(rank, size) else None, telling=telling
    )
    spare = message.posted.numel() - part.numel()
    if forwards(1, size) and spare < forwarded:
        raise TransportError(
            f"cannot receive {part.numel()} bytes in a group of {size}: got address space for {spare} more, expected "
            f"{forwarded}, because members pass on marks; raise the limit on address space (ulimit -v)"
        )
    return message


def telling_bytes(dtype: torch.dtype) -> int:
    """How many bytes at the end of a tensor tell that they were never written, when they equal the mark's.

    Numbers do not look like it; the elements of other types might, so that more of them are asked for. (No parameter
    has such a type: a message that is short by less is refused for its dtype.)
    """
    if dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu):
        return 1  # 0xff is no number
    return 2 if dtype.is_floating_point and dtype.itemsize > 1 else 4


class ExpectedMessage:
    """One expected message: `posted` is what to receive into, `check` says whether exactly `part` was filled.

    What follows `part` in its allocation is scratch.
    """

    def __init__(self, part: torch.Tensor, *, spare: int | None = None, telling: int = 4) -> None:
        """`part`: uint8 on the CPU. `spare`: how much more to post at most; `telling`: see `telling_bytes`."""
        self._part = part
        self._telling = telling
        storage = part.untyped_storage()
        start = part.storage_offset()
        room = storage.nbytes() - start - part.numel()
        room = room if spare is None else min(room, spare)
        whole = torch.empty(0, dtype=torch.uint8).set_(storage, start, (part.numel() + room,))  # type: ignore[call-overload]
        self.posted: torch.Tensor = whole
        self._inside = part[max(0, part.numel() - len(_TAIL)) :]
        self._behind = whole[part.numel() : part.numel() + len(_BEHIND)]
        self._inside.copy_(_mark(_TAIL)[len(_TAIL) - self._inside.numel() :])
        self._behind.copy_(_mark(_BEHIND)[: self._behind.numel()])

    def check(self, what: str) -> None:
        """`TransportError` unless as many bytes came as `part` has."""
        longer = not torch.equal(self._behind, _mark(_BEHIND)[: self._behind.numel()])
        missing = self._missing()
        if longer or missing >= self._telling:
            raise TransportError(
                f"{what}: got {'more' if longer else 'fewer'} bytes than announced, expected {self._part.numel()}; "
                "send each tensor in the dtype and shape that were announced for it"
            )

    def _missing(self) -> int:
        """How many bytes at the end are still the mark's."""
        same = self._inside == _mark(_TAIL)[len(_TAIL) - self._inside.numel() :]
        changed = same.logical_not().nonzero()
        return self._inside.numel() - (int(changed[-1]) + 1 if changed.numel() else 0)


def _mark(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
