"""Objects between ranks: msgpack in a frame of fixed size, and what does not fit into it in a second message.

The receiver knows the size of the first message beforehand and reads that of the second there, so most objects cost one
message.
"""

from __future__ import annotations

from typing import Any

import msgspec
import torch

from weight_sync.errors import ProtocolError

FRAME_BYTES = 4096
"""Size of the first message."""
_LENGTH_BYTES = 8
_ROOM = FRAME_BYTES - _LENGTH_BYTES
_MAX_OBJECT_BYTES = 1 << 30


def new_frame() -> torch.Tensor:
    """Memory for a first message."""
    return torch.zeros(FRAME_BYTES, dtype=torch.uint8)


def encode(value: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Both messages of `value`; the second is None when the first holds all."""
    payload = msgspec.msgpack.encode(value)
    head = len(payload).to_bytes(_LENGTH_BYTES, "little") + payload[:_ROOM]
    frame = new_frame()
    frame[: len(head)] = _tensor(head)
    return frame, _tensor(payload[_ROOM:]) if len(payload) > _ROOM else None


def rest_of(frame: torch.Tensor) -> torch.Tensor | None:
    """Memory for the second message of a received frame, or None when there is none."""
    more = _length(frame) - _ROOM
    return torch.empty(more, dtype=torch.uint8) if more > 0 else None


def decode(frame: torch.Tensor, rest: torch.Tensor | None, type: Any) -> Any:
    """The object, as `type`; `ProtocolError` when it is something else."""
    payload = frame[_LENGTH_BYTES : _LENGTH_BYTES + _length(frame)].numpy().tobytes()
    if rest is not None:
        payload += rest.numpy().tobytes()
    return decode_bytes(payload, type)


def decode_bytes(payload: bytes, type: Any) -> Any:
    """The object of a whole message, as `type`; `ProtocolError` when it is something else."""
    try:
        return msgspec.msgpack.decode(payload, type=type)
    except msgspec.DecodeError as error:
        raise ProtocolError(
            f"cannot read an object from another rank: got {error}, expected {type}; run the same release on all ranks"
        ) from error


def _length(frame: torch.Tensor) -> int:
    length = int.from_bytes(frame[:_LENGTH_BYTES].numpy().tobytes(), "little")
    if length > _MAX_OBJECT_BYTES:
        raise ProtocolError(
            f"cannot read an object from another rank: got a length of {length}, expected at most {_MAX_OBJECT_BYTES}; "
            "have all ranks call the same methods in the same order"
        )
    return length


def _tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
