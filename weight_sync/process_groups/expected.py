"""Messages whose sender may have announced the wrong length: every member proves that of what it took.

gloo says nothing when a message is shorter than the memory that was posted for it, and ends the process when it is
longer (see `receiving_process`). So a member puts marks over the last expected bytes and posts a few more behind them,
marked too: a mark that is still there was not reached, one that is gone was written over.

The marks are the same in every member. gloo broadcasts along a tree, whose inner members pass on all that they posted,
marks and all: whoever gets bytes through others sees the same marks as they do, and all come to the same answer.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from ..errors import TransportError
from .communicator import Communicator

_TAIL = bytes(range(0x51, 0x5F)) + b"\xfb\xff"
"""Over the last expected bytes. Its end is no number in any floating-point format: two bytes of it tell enough."""
_BEHIND = bytes(range(0xA1, 0xB1))
"""Right behind them."""
BEHIND_BYTES = len(_BEHIND)
"""How many bytes behind an expected message are scratch."""


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

    `BEHIND_BYTES` behind `part` are scratch.
    """

    def __init__(self, part: torch.Tensor, *, telling: int = 4) -> None:
        """`part`: uint8 on the CPU, not at the end of its allocation. `telling`: see `telling_bytes`."""
        self._part = part
        self._telling = telling
        size = part.numel()
        self.posted: torch.Tensor = part.as_strided((size + BEHIND_BYTES,), (1,))
        self._inside = part[max(0, size - len(_TAIL)) :]
        self._behind = self.posted[size:]
        self._inside.copy_(_mark(_TAIL)[len(_TAIL) - self._inside.numel() :])
        self._behind.copy_(_mark(_BEHIND))

    def check(self, what: str) -> None:
        """`TransportError` unless as many bytes came as `part` has."""
        longer = not torch.equal(self._behind, _mark(_BEHIND))
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


def receive_expected(
    communicator: Communicator,
    parts: Sequence[torch.Tensor],
    *,
    end: float,
    telling: Sequence[int],
) -> None:
    """What others receive with `broadcast_parts`, over gloo and one at a time, each with a proof of its length.

    `telling`: one number for each part. What is behind a part is scratch until the next one comes.
    """
    for i, (part, tells) in enumerate(zip(parts, telling, strict=True)):
        message = ExpectedMessage(part, telling=tells)
        left_s = end - time.monotonic()
        try:
            communicator.post_broadcast(message.posted, root=0, timeout_s=left_s).wait()
        except TransportError as error:
            raise TransportError(
                f"{error} (a member ends, too, when it gets more bytes than announced)"
            ) from error
        message.check(f"group {communicator.name!r}, part {i}")


def _mark(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
